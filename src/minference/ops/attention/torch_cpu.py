"""Sparse attention in vectorised torch, made for the CPU: gather a tile's keys, attend densely.

No n x n mask: the largest tensor is one tile's scores.
"""

import itertools
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minference.index import BLOCK, BOTH_HALVES, TILE, WHOLE, SparseIndex


def _tile_parts(
    index: SparseIndex, b: int, h: int, tile: int, rows: range
) -> Iterator[tuple[range, Int[Tensor, " n"]]]:
    """Runs of a tile's rows that read the same keys, and those keys' positions, ascending.

    A tile is one run, unless some of its blocks serve one half of the rows only.
    """
    halves = index.tile_blocks(b, h, tile)
    columns = index.tile_columns(b, h, tile, halves)
    split = bool(((halves != 0) & (halves != BOTH_HALVES)).any())
    step = BLOCK if split else TILE
    for begin in range(tile * TILE, (tile + 1) * TILE, step):
        run = range(max(rows.start, begin), min(rows.stop, begin + step))
        if not len(run):
            continue
        bit = 1 + (begin - tile * TILE) // BLOCK
        blocks = ((halves & bit) != 0).nonzero()[:, 0]
        keys = (blocks[:, None] * BLOCK + torch.arange(BLOCK, device=index.device)).flatten()
        if columns.numel():
            keys = torch.cat([keys, columns]).sort().values
        yield run, keys[: int(torch.searchsorted(keys, run.stop))]


def _hide(
    scores: Float[Tensor, "G rows n"], keys: Int[Tensor, " n"], run: range, window: int, sink: int
) -> None:
    """Set the scores that causality, window and sink forbid to -inf, in place."""
    queries = torch.arange(run.start, run.stop, device=keys.device)[:, None]
    begin = int(torch.searchsorted(keys, run.start + 1))
    scores[..., begin:].masked_fill_(keys[begin:] > queries, -torch.inf)
    if window < WHOLE:
        far = slice(*(int(torch.searchsorted(keys, x)) for x in (sink, run.stop - window)))
        scores[..., far].masked_fill_(queries - keys[far] >= window, -torch.inf)


def sparse_attention(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N D"],
    index: SparseIndex,
    *,
    scale: float,
    softcap: float = 0.0,
    return_lse: bool = True,
) -> tuple[Float[Tensor, "B H L D"], Float[Tensor, "B H L"] | None]:
    """Attention over the index's keys in float32; on request its log-sum-exp (natural logarithm).

    Rows that are padding give 0 and -inf.
    """
    batch, heads, q_len, dim = q.shape
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full((batch, heads, q_len), -torch.inf, device=q.device) if return_lse else None
    share = heads // index.heads
    windows, sinks = index.window.tolist(), index.sink.tolist()
    for b in range(batch):
        rows, shift, first = index.rows(b), index.query_start(b), int(index.first[b])
        for h, tile in itertools.product(range(index.heads), index.tiles(b)):
            kv_head = h * k.shape[1] // index.heads
            for run, keys in _tile_parts(index, b, h, tile, rows):
                own = slice(run.start - shift, run.stop - shift)
                place = (b, slice(h * share, (h + 1) * share), own)
                gathered = k[b, kv_head, first:].index_select(0, keys).float()
                scores = (q[place].reshape(-1, dim).float() * scale) @ gathered.T
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                scores = scores.view(share, len(run), -1)
                _hide(scores, keys, run, windows[h], sinks[h])
                if lse is not None:
                    lse[place] = scores.logsumexp(dim=-1)
                values = v[b, kv_head, first:].index_select(0, keys).float()
                out[place] = (scores.softmax(dim=-1) @ values).to(q.dtype)
    return out, lse
