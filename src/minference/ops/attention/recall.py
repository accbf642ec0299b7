"""How much of dense attention a sparse one kept: exact, on a sample of rows.

Kept mass (recall) of a row is exp(lse_sparse - lse_dense): the share of its softmax that fell on
computed keys. The output error weighs it with the values.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minference.index import SparseIndex
from minference.ops.build import Layout
from minference.ops.checks import score_factor
from minference.ops.scores import softcapped


def sample_rows(q_len: int, count: int, device: torch.device | str = "cpu") -> Int[Tensor, " R"]:
    """At most `count` rows of a buffer of `q_len` queries, evenly spread, the last one among
    them."""
    if count < 1:
        raise ValueError(f"the number of rows must be at least 1, got {count}")
    count = min(count, q_len)
    return torch.linspace(q_len, q_len / count, count, device=device).ceil().long().flip(0) - 1


def dense_rows(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N E"],
    layout: Layout | SparseIndex,
    rows: Int[Tensor, " R"],
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Float[Tensor, " H"] | None = None,
) -> tuple[Float[Tensor, "B H R E"], Float[Tensor, "B H R"]]:
    """Dense causal attention of some rows in float32, a head at a time.

    Args:
        q: queries.
        k: keys.
        v: values.
        layout: which tokens of q, k and v are real.
        rows: which rows of q.
        scale: factor of the scores; D ** -0.5 unless given.
        softcap: as in `sparse_attention`.
        sinks: as in `sparse_attention`.

    Returns:
        The outputs, and the log-sum-exp of the scores (sinks included); 0 and -inf for padding.
    """
    batch, heads, q_len, _ = q.shape
    scale = score_factor(q, scale, softcap)
    places = torch.arange(k.shape[2], device=q.device)
    asked = (rows + k.shape[2] - q_len)[:, None]
    out = q.new_zeros(batch, heads, len(rows), v.shape[-1], dtype=torch.float32)
    lse = torch.full(out.shape[:3], -torch.inf, device=q.device)
    for b in range(batch):
        seen = (places >= layout.first[b]) & (places <= asked) & (asked < layout.stop[b])
        for h in range(heads):
            kv_head = h * k.shape[1] // heads
            scores = softcapped(q[b, h, rows].float() * scale @ k[b, kv_head].float().T, softcap)
            scores = scores.masked_fill(~seen, -torch.inf)
            total = scores.logsumexp(dim=-1)
            if sinks is not None:
                total = torch.where(
                    seen.any(dim=-1), torch.logaddexp(total, sinks[h].float()), total
                )
            weights = (scores - total[:, None]).exp().nan_to_num(0.0)
            out[b, h], lse[b, h] = weights @ v[b, kv_head].float(), total
    return out, lse


def kept_mass(
    lse: Float[Tensor, "B H R"], dense_lse: Float[Tensor, "B H R"]
) -> Float[Tensor, "B H R"]:
    """Share of the attention mass that was computed, at most 1; 1 for padding."""
    return (lse - dense_lse).exp().nan_to_num(1.0).clamp(max=1.0)


def output_error(
    out: Float[Tensor, "B H R E"], dense: Float[Tensor, "B H R E"]
) -> Float[Tensor, "B H"]:
    """Distance of the sampled outputs from the dense ones, in units of the latter's 2-norm."""
    size = dense.float().flatten(2).norm(dim=-1)
    return (out.float() - dense.float()).flatten(2).norm(dim=-1) / size.clamp(min=1e-12)
