"""Sparse attention in vectorised torch, made for the CPU: gather a tile's keys, attend densely.

No n x n mask: the largest tensor is one tile's scores.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minference.index import BLOCK, BOTH_HALVES, TILE, WHOLE, SparseIndex


def _tile_keys(
    index: SparseIndex, b: int, h: int, tile: int
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n_blocks"]]:
    """Positions of the keys that a tile reads, ascending, and its blocks' row halves."""
    halves = index.tile_blocks(b, h, tile)
    blocks = halves.nonzero()[:, 0]
    keys = (blocks[:, None] * BLOCK + torch.arange(BLOCK, device=index.device)).flatten()
    columns = index.tile_columns(b, h, tile, halves)
    if columns.numel():
        keys = torch.cat([keys, columns]).sort().values
    return keys, halves


def _hide(
    scores: Float[Tensor, "G rows n"],
    keys: Int[Tensor, " n"],
    queries: Int[Tensor, " rows"],
    halves: Int[Tensor, " n_blocks"],
    window: int,
    sink: int,
) -> None:
    """Set the scores that causality, half bits, window and sink forbid to -inf, in place."""
    tile_start = int(queries[0]) // TILE * TILE
    plain = window >= WHOLE and bool(((halves == 0) | (halves == BOTH_HALVES)).all())
    begin = int(torch.searchsorted(keys, tile_start)) if plain else 0
    distance = queries[:, None] - keys[begin:]
    hidden = distance < 0
    if not plain:
        half_bit = 1 + (queries - tile_start) // BLOCK
        whole = torch.where(halves == 0, BOTH_HALVES, halves)[keys // BLOCK]
        hidden |= (whole & half_bit[:, None]) == 0
        hidden |= (distance >= window) & (keys >= sink)
    scores[..., begin:].masked_fill_(hidden, -torch.inf)


def sparse_attention(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N D"],
    index: SparseIndex,
    *,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Float[Tensor, "B H L D"], Float[Tensor, "B H L"]]:
    """Attention over the index's keys in float32, and its log-sum-exp (natural logarithm).

    Rows that are padding give 0 and -inf.
    """
    batch, heads, q_len, dim = q.shape
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full((batch, heads, q_len), -torch.inf, device=q.device)
    share = heads // index.heads
    windows, sinks = index.window.tolist(), index.sink.tolist()
    for b in range(batch):
        rows, shift, first = index.rows(b), index.query_start(b), int(index.first[b])
        for h in range(index.heads):
            kv_head = h * k.shape[1] // index.heads
            keys_of_head, values_of_head = k[b, kv_head, first:], v[b, kv_head, first:]
            for tile in index.tiles(b):
                a, z = max(rows.start, tile * TILE), min(rows.stop, (tile + 1) * TILE)
                own = (b, slice(h * share, (h + 1) * share), slice(a - shift, z - shift))
                queries = torch.arange(a, z, device=q.device)
                keys, halves = _tile_keys(index, b, h, tile)
                keys = keys[: int(torch.searchsorted(keys, z))]
                gathered = keys_of_head.index_select(0, keys).float()
                scores = (q[own].reshape(-1, dim).float() * scale) @ gathered.T
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                scores = scores.view(share, z - a, -1)
                _hide(scores, keys, queries, halves, windows[h], sinks[h])
                lse[own] = scores.logsumexp(dim=-1)
                weights = scores.softmax(dim=-1)
                values = values_of_head.index_select(0, keys).float()
                out[own] = (weights @ values).to(q.dtype)
    return out, lse
