"""Keep one head's queries and keys while an attached model reads a prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

import minference
from minference.methods.base import Context, Method
from minference.ops.build import dense_index
from minference.viz.attention_map import attention_figure, computed_cells, pooled_attention
from minference.viz.pictures import save_figure

if TYPE_CHECKING:
    from minference.integrations.transformers.handle import Handle


@dataclass(frozen=True)
class Seen:
    """What a head of batch row 0 worked on: its queries [L, D], its keys [N, D], and the call."""

    q: Tensor
    k: Tensor
    context: Context


@dataclass
class Probe:
    """An observer for `attach(model, method, record=True, observe=probe)`.

    Attributes:
        layer: number of the layer to watch.
        head: number of the query head to keep.
        seen: what the last prefill showed of it; None before.
    """

    layer: int
    head: int
    seen: Seen | None = field(default=None, repr=False)

    @classmethod
    def of(cls, config: Any, layer: int, head: int) -> Self:  # noqa: ANN401
        """A probe of a head that the model of this config has.

        Raises:
            ValueError: there is no such layer or head.
        """
        own = config.get_text_config(decoder=True)
        for name, value, count in (
            ("layer", layer, own.num_hidden_layers),
            ("head", head, own.num_attention_heads),
        ):
            if not 0 <= value < count:
                raise ValueError(f"{name} must be 0 to {count - 1} for this model, got {value}")
        return cls(layer, head)

    def __call__(self, context: Context, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Keeps the head if the call is its layer's."""
        if context.layer == self.layer and self.head in context.heads:
            own = context.heads.index(self.head)
            kv = own * k.shape[1] // q.shape[1]
            self.seen = Seen(q[0, own].clone(), k[0, kv].clone(), context)

    def save(self, handle: Handle, path: Path) -> None:
        """Draws the head's attention and the tiles that were computed of it, in the file's format.

        Args:
            handle: the attached model, after the prefill.
            path: picture to write; its folder is made.

        Raises:
            ValueError: the layer was never served by the method, so that nothing was seen.
        """
        seen = self.seen
        if seen is None:
            raise ValueError(
                f"nothing to draw of layer {self.layer}: it has a sliding window, or the prompt is "
                "below the method's threshold; name another layer, or --method NAME:min_seq_len=0"
            )
        heads = len(seen.context.heads)
        index = dict(handle.indices)[self.layer] or dense_index(seen.context.layout, heads)
        own = seen.context.heads.index(self.head) * index.heads // heads
        density = float(index.head_density()[0, own])
        weights = pooled_attention(
            seen.q, seen.k, scale=seen.context.scale, softcap=seen.context.softcap
        )
        figure = attention_figure(
            weights,
            computed_cells(index, own),
            length=len(seen.k),
            title=f"layer {self.layer}, head {self.head}: {handle.method.name}, "
            f"density {density:.3f}",
        )
        save_figure(figure, path, dpi=110)


def watch(model: Any, ids: Tensor, method: Method, probe: Probe, rows: int) -> Handle:  # noqa: ANN401
    """Reads a prompt of any length by a method; the handle, detached, tells what was kept.

    Args:
        model: a causal language model of transformers.
        ids: the prompt, [1, L].
        method: what builds the indices.
        probe: keeps a head for `Probe.save`.
        rows: rows of each layer to measure the kept mass on.
    """
    options = {"min_seq_len": 0, "recall_rows": rows, "observe": probe}
    with minference.attach(model, method, **options) as handle, torch.inference_mode():
        model(ids, use_cache=False, logits_to_keep=1)
    return handle
