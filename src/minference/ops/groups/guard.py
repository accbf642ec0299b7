"""How much attention the chosen blocks keep, exactly, on rows that the estimate did not see; what
keeps too little gets its candidates, and at last every block."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minference.index import BLOCK, TILE, Ragged
from minference.ops.build import Layout
from minference.ops.groups.plan import GROUP_TILES, group_count

GUARD_SLOTS = 256
"""Most guarded rows of a KV head and call, each for all its query heads; evenly spread groups."""


class Guarded(NamedTuple):
    """Lists that keep the target where anything does.

    Attributes:
        lists: block lists of each tile.
        recall: share of the attention that the first lists kept, a mean over a row's query heads.
        level: 0 where they were good enough, 1 where all candidates were taken, 2 for every block.
    """

    lists: Ragged
    recall: Float[Tensor, "B Hkv slots"]
    level: Int[Tensor, "B Hkv slots"]


Recall = Callable[[Ragged, int], Float[Tensor, "B Hkv slots"]]
"""What lists for groups of so many tiles keep of the guarded rows' attention."""


def stride_of(layout: Layout) -> int:
    """Groups that one guarded row speaks for."""
    return -(-group_count(layout) // GUARD_SLOTS)


def guard_rows(layout: Layout) -> Int[Tensor, "B slots"]:
    """Positions of the guarded rows, -1 for groups without real rows; scattered in their groups,
    so that no regular text lines up with them."""
    size = GROUP_TILES * TILE
    stride = stride_of(layout)
    begin = (layout.kv_len - layout.q_len - layout.first).clamp(min=0)[:, None]
    slots = -(-group_count(layout) // stride)
    group = begin // size + stride * torch.arange(slots, device=layout.device)
    low = torch.maximum(group * size, begin)
    stop = torch.minimum((group + 1) * size, (layout.stop - layout.first)[:, None])
    row = low + (group * 167 + 61) % (stop - low).clamp(min=1)
    return torch.where(low < stop, row, -1)


def lists_of_rows(
    lists: Ragged, tiles: int, rows: Int[Tensor, "B slots"], layout: Layout
) -> Ragged:
    """The list of each guarded row, from lists for `tiles` tiles each; empty for rows that are
    not."""
    size = tiles * TILE
    begin = (layout.kv_len - layout.q_len - layout.first).clamp(min=0)[:, None]
    at = (rows // size - begin // size).clamp(0, lists.count.shape[2] - 1)
    at = at[:, None].expand(-1, lists.count.shape[1], -1)
    count = lists.count.gather(2, at) * (rows >= 0)[:, None]
    return Ragged(lists.values, lists.start.gather(2, at).contiguous(), count.to(torch.int32))


def kept_share(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    lists: Ragged,
    tiles: int,
    layout: Layout,
    *,
    scale: float,
    softcap: float = 0.0,
) -> Float[Tensor, "B Hkv slots"]:
    """Share of the guarded rows' attention that falls on their lists, a mean over the query heads
    of a KV head; 1 for rows that are not. Plain torch; reads the layout on the host."""
    rows = guard_rows(layout)
    own = lists_of_rows(lists, tiles, rows, layout)
    kept = q.new_ones(own.count.shape, dtype=torch.float32)
    for b in range(layout.batch):
        first, real = int(layout.first[b]), int(layout.stop[b] - layout.first[b])
        keys = torch.arange(real, device=k.device)
        for slot, row in enumerate(rows[b].tolist()):
            if row < 0:
                continue
            place = row + first - (layout.kv_len - layout.q_len)
            asked = q[b, :, place].float().unflatten(0, (k.shape[1], -1)) * scale
            scores = asked @ k[b, :, first : first + real].float().transpose(1, 2)
            scores = softcap * (scores / softcap).tanh() if softcap else scores
            dense = scores.masked_fill(keys > row, float("-inf")).softmax(dim=-1).mean(dim=1)
            for h in range(k.shape[1]):
                flags = torch.zeros(real // BLOCK + 2, dtype=torch.bool, device=k.device)
                entries = own.row(b, h, slot) // 4
                flags[entries[entries <= real // BLOCK].long()] = True
                kept[b, h, slot] = (dense[h] * flags[keys // BLOCK]).sum()
    return kept


def guard(
    lists: Ragged, candidates: Ragged, layout: Layout, recall: Recall, target: float
) -> Guarded:
    """Replaces the lists of groups whose guarded row keeps less than `target`."""
    first = recall(lists, 1)
    better = torch.where(recall(candidates, GROUP_TILES) >= target, 1, 2)
    level = torch.where(first >= target, 0, better)
    tiles = layout.chunk_tiles
    begin = (layout.kv_len - layout.q_len - layout.first).clamp(min=0)[:, None]
    tile = begin // TILE + torch.arange(tiles, device=layout.device)
    group = tile // GROUP_TILES - begin // (GROUP_TILES * TILE)
    shape = (-1, lists.count.shape[1], -1)
    slot = (group // stride_of(layout)).clamp(max=level.shape[2] - 1)[:, None].expand(shape)
    of = level.gather(2, slot)
    group = group.clamp(max=candidates.count.shape[2] - 1)[:, None].expand(shape)
    blocks = 2 * -(-layout.kv_len // TILE)
    every = torch.arange(blocks, dtype=torch.int32, device=layout.device) * 4 + 3
    values = torch.cat([lists.values, candidates.values, every])
    base = lists.values.numel()
    all_of_it = (2 * tile + 2).clamp(max=blocks)[:, None].expand_as(of)
    count = torch.where(of == 1, candidates.count.gather(2, group), lists.count)
    count = torch.where((of == 2) & (lists.count > 0), all_of_it, count)
    start = torch.where(of == 1, candidates.start.gather(2, group) + base, lists.start)
    start = torch.where(of == 2, base + candidates.values.numel(), start)
    return Guarded(Ragged(values, start, count.to(torch.int32)), first, level)
