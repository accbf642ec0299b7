"""Whether an index leaves enough out to be worth a sparse kernel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from minference.index import BLOCK, ENTRY, TILE, Ragged, SparseIndex

DENSE_FROM = 0.9
"""Share of the causal area from which the dense kernel serves: over what the sparse kernels compute
they reach 0.80 to 0.91 of its rate (docs/hopper.md), so that no index of more can win."""


def covered_share(index: SparseIndex) -> float:
    """About the share of the causal area that an index computes, from its lists' lengths.

    Columns inside computed blocks count twice, so it is seldom too low. Waits for the device.
    """
    begin = (index.kv_len - index.q_len - index.first).clamp(min=0).long()
    stop = torch.minimum(index.stop - index.first, begin + index.q_len).clamp(min=0).long()
    tiles = torch.arange(-(-index.kv_len // TILE), device=index.device)
    first = begin // TILE
    here = (tiles >= first[:, None]) & (tiles * TILE < stop[:, None])  # [B, T]
    size = index.group_tiles.long()[:, None]
    group = (tiles // size)[None] - (first[:, None, None] // size)  # [B, H, T]
    halves, listed = _listed(_halves(index.blocks), group), _listed(index.blocks.count, group)
    blocks = halves / 2 + _offsets(index, tiles, group)
    causal = tiles * TILE + TILE // 2
    # of the two blocks on the diagonal half lies behind the rows, a quarter with lists by halves
    behind = torch.where(halves < 2 * listed, BLOCK // 2, TILE // 2)
    keys = blocks * BLOCK - behind + _columns(index, tiles)
    wanted = (torch.minimum(keys, causal.expand_as(keys)) * here[:, None]).sum(dim=-1)
    area = (causal * here).sum(dim=-1, keepdim=True).clamp(min=1)
    return float((wanted / area).mean())


def _halves(lists: Ragged) -> Tensor:
    """Row halves that the entries of each list name, [B, H, G]."""
    bits = lists.values % ENTRY
    before = pad((bits % 2 + bits // 2).cumsum(0, dtype=torch.int32), (1, 0))
    return before[lists.start + lists.count] - before[lists.start]


def _listed(count: Tensor, group: Tensor) -> Tensor:
    inside = (group >= 0) & (group < count.shape[2])
    return count.long().gather(2, group.clamp(0, count.shape[2] - 1)) * inside


def _offsets(index: SparseIndex, tiles: Tensor, group: Tensor) -> Tensor:
    """Offsets of each tile that stay at or behind position 0, [B, H, T]."""
    lists = index.offsets
    if lists.count.shape[2] > 1:
        return _listed(lists.count, group)
    return _below(lists.values, lists.start, lists.count, 2 * tiles + 1)


def _columns(index: SparseIndex, tiles: Tensor) -> Tensor:
    lists = index.columns
    return _below(lists.values, lists.start, lists.count, tiles * TILE + TILE // 2)


def _below(values: Tensor, start: Tensor, count: Tensor, limits: Tensor) -> Tensor:
    """How many entries of each [B, H, 1] list are smaller than each limit: [B, H, limits]."""
    places = torch.arange(max(1, int(count.max())), device=values.device)
    at = (start + places).clamp(max=values.shape[0] - 1)
    rows = torch.where(places < count, values[at].long(), torch.iinfo(torch.int64).max)
    wanted = limits.expand(*rows.shape[:2], -1).contiguous()
    return torch.searchsorted(rows.contiguous(), wanted)
