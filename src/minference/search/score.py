"""How well patterns serve the heads of one layer, by the operations that serve."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minference.head_patterns import HeadPatterns
from minference.methods.base import Context
from minference.methods.minference import MInference
from minference.ops.attention.api import even_head_dims, sparse_attention
from minference.ops.attention.recall import dense_rows, kept_mass, output_error, sample_rows
from minference.ops.build import dense_index
from minference.patterns import BUDGET_LENGTH, Pattern

OBJECTIVES = ("output", "mass")


@dataclass(frozen=True)
class Call:
    """One layer's attention call: q [B, H, L, D], k and v [B, Hkv, N, D], and its context."""

    q: Tensor
    k: Tensor
    v: Tensor
    context: Context


class LayerScorer:
    """Scores patterns on one call; the dense rows to compare with are computed once."""

    def __init__(self, call: Call, rows: int) -> None:
        self.call = call
        layout = call.context.layout
        self.rows: Int[Tensor, " R"] = sample_rows(layout.q_len, rows, call.q.device)
        self.dense, self.dense_lse = dense_rows(
            call.q,
            call.k,
            call.v,
            layout,
            self.rows,
            scale=call.context.scale,
            softcap=call.context.softcap,
            sinks=call.context.sinks,
        )

    def scores(self, patterns: Sequence[Pattern]) -> dict[str, Float[Tensor, " H"]]:
        """Scores of one pattern for each head, by objective, at most 1 (as good as dense).

        "mass" is the attention mass kept by the sampled rows, on average; "output" is 1 minus the
        error of their outputs relative to the dense ones.
        """
        call = self.call
        own = replace(call.context, layer=0, heads=tuple(range(call.q.shape[1])))
        method = MInference(patterns=HeadPatterns((tuple(patterns),)), budget_length=BUDGET_LENGTH)
        index = method.build_index(call.q, call.k, own)
        if index is None:
            index = dense_index(own.layout, call.q.shape[1])
        q, k, v = even_head_dims(call.q, call.k, call.v)
        out, lse = sparse_attention(
            q,
            k,
            v,
            index,
            scale=own.scale,
            softcap=own.softcap,
            sinks=own.sinks,
            return_lse=True,
            impl=own.impl,
        )
        kept = kept_mass(lse[:, :, self.rows], self.dense_lse)
        error = output_error(out[:, :, self.rows, : call.v.shape[-1]], self.dense)
        return {"mass": kept.mean(dim=(0, 2)), "output": 1 - error.mean(dim=0)}


def score_layer(
    call: Call, candidates: Sequence[Pattern], *, rows: int
) -> dict[str, Float[Tensor, "candidates H"]]:
    """Score of every candidate for every head of the layer, by objective."""
    scorer, heads = LayerScorer(call, rows), call.q.shape[1]
    found = [scorer.scores([candidate] * heads) for candidate in candidates]
    return {name: torch.stack([scores[name] for scores in found]) for name in OBJECTIVES}
