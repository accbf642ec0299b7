"""Sparse attention the readable way: one tile of one head at a time, through its mask."""

import torch
from jaxtyping import Float
from torch import Tensor

from minference.index import TILE, SparseIndex
from minference.ops.attention.fp8 import round_weights, rounded_qkv
from minference.ops.scores import softcapped


def sparse_attention(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N D"],
    index: SparseIndex,
    *,
    scale: float,
    softcap: float = 0.0,
    fp8: bool = False,
) -> tuple[Float[Tensor, "B H L D"], Float[Tensor, "B H L"]]:
    """Attention over the index's keys in float32, and its log-sum-exp (natural logarithm).

    Rows that are padding, or have no key, give 0 and -inf. With fp8, q, k, v and the weights are
    rounded to e4m3.
    """
    batch, heads, q_len, _ = q.shape
    dtype = q.dtype
    if fp8:
        q, k, v = rounded_qkv(q, k, v, index)
    out = torch.zeros_like(q, dtype=torch.float32)
    lse = torch.full((batch, heads, q_len), -torch.inf, device=q.device)
    for b in range(batch):
        rows, shift, first = index.rows(b), index.query_start(b), int(index.first[b])
        for tile in index.tiles(b):
            a, z = max(rows.start, tile * TILE), min(rows.stop, (tile + 1) * TILE)
            here = slice(a - shift, z - shift)
            for h in range(heads):
                kv_head = h * k.shape[1] // heads
                mask = index.tile_mask(b, h * index.heads // heads, tile)
                mask = mask[a - tile * TILE : z - tile * TILE, :z]
                keys, values = (x[b, kv_head, first : first + z].float() for x in (k, v))
                scores = softcapped(q[b, h, here].float() @ keys.T * scale, softcap)
                scores = scores.masked_fill(~mask, -torch.inf)
                lse[b, h, here] = scores.logsumexp(dim=-1)
                weights = scores.softmax(dim=-1).masked_fill(~mask.any(dim=-1)[:, None], 0.0)
                out[b, h, here] = (round_weights(weights) if fp8 else weights) @ values
    return out.to(dtype), lse
