"""How much attention the chosen blocks keep, exactly, on rows that the estimate did not see; what
keeps too little gets the group's wider list, and at last every block."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minference.index import BLOCK, TILE, Ragged, whole_entries
from minference.ops.build import Layout
from minference.ops.groups.plan import GROUP, GROUP_TILES, group_count
from minference.ops.scores import softcapped

GUARD_SLOTS = 256
"""Most guarded rows of a KV head and call, each for all its query heads; evenly spread groups."""


DROPPED = 0.3
"""Share of a head's attention that a guarded row may have in one block that its list drops."""


class Kept(NamedTuple):
    """What lists keep of the guarded rows' attention; 1 and 0 for rows that are not.

    Attributes:
        recall: share that they keep, a mean over a row's query heads.
        dropped: largest share that a head has in one block that they drop.
    """

    recall: Float[Tensor, "B Hkv slots"]
    dropped: Float[Tensor, "B Hkv slots"]

    def enough(self, target: float) -> Bool[Tensor, "B Hkv slots"]:
        """Whether that will do."""
        return (self.recall >= target) & (self.dropped < DROPPED)


class Guarded(NamedTuple):
    """Lists that keep the target where anything does.

    Attributes:
        lists: block lists of each tile.
        recall: share of the attention that the first lists kept, a mean over a row's query heads.
        level: 0 where they were good enough, 1 where the group's wider list was taken, 2 for every
            block.
    """

    lists: Ragged
    recall: Float[Tensor, "B Hkv slots"]
    level: Int[Tensor, "B Hkv slots"]


def stride_of(layout: Layout) -> int:
    """Groups that one guarded row speaks for."""
    return -(-group_count(layout) // GUARD_SLOTS)


def guard_rows(layout: Layout) -> Int[Tensor, "B slots"]:
    """Positions of the guarded rows, -1 for groups without real rows; scattered in their groups,
    so that no regular text lines up with them."""
    stride = stride_of(layout)
    begin = layout.begin[:, None]
    slots = -(-group_count(layout) // stride)
    group = begin // GROUP + stride * torch.arange(slots, device=layout.device)
    low = torch.maximum(group * GROUP, begin)
    stop = torch.minimum((group + 1) * GROUP, (layout.stop - layout.first)[:, None])
    row = low + (group * 167 + 61) % (stop - low).clamp(min=1)
    return torch.where(low < stop, row, -1)


def lists_of_rows(
    lists: Ragged, tiles: int, rows: Int[Tensor, "B slots"], layout: Layout
) -> Ragged:
    """The list of each guarded row, from lists for `tiles` tiles each; empty for rows that are
    not."""
    size = tiles * TILE
    begin = layout.begin[:, None]
    at = (rows // size - begin // size).clamp(0, lists.count.shape[2] - 1)
    at = at[:, None].expand(-1, lists.count.shape[1], -1)
    count = lists.count.gather(2, at) * (rows >= 0)[:, None]
    return Ragged(lists.values, lists.start.gather(2, at).contiguous(), count.to(torch.int32))


def kept_shares(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    lists: Ragged,
    tiles: int,
    layout: Layout,
    *,
    scale: float,
    softcap: float = 0.0,
) -> Kept:
    """What lists for `tiles` tiles each keep. Plain torch; reads the layout on the host."""
    rows = guard_rows(layout)
    own = lists_of_rows(lists, tiles, rows, layout)
    recall = q.new_ones(own.count.shape, dtype=torch.float32)
    dropped = torch.zeros_like(recall)
    for b in range(layout.batch):
        first, real = int(layout.first[b]), int(layout.stop[b] - layout.first[b])
        keys = torch.arange(real, device=k.device)
        for slot, row in enumerate(rows[b].tolist()):
            if row < 0:
                continue
            place = row + first - (layout.kv_len - layout.q_len)
            asked = q[b, :, place].float().unflatten(0, (k.shape[1], -1)) * scale
            scores = softcapped(
                asked @ k[b, :, first : first + real].float().transpose(1, 2), softcap
            )
            dense = scores.masked_fill(keys > row, float("-inf")).softmax(dim=-1)
            dense = torch.nn.functional.pad(dense, (0, -real % BLOCK))
            dense = dense.unflatten(-1, (-1, BLOCK)).sum(dim=-1)
            for h in range(k.shape[1]):
                flags = torch.zeros(dense.shape[-1], dtype=torch.bool, device=k.device)
                entries = own.row(b, h, slot) // 4
                flags[entries[entries < len(flags)].long()] = True
                recall[b, h, slot] = (dense[h] * flags).sum(dim=-1).mean()
                dropped[b, h, slot] = (dense[h] * ~flags).amax()
    return Kept(recall, dropped)


def guard(
    lists: Ragged, wider: Ragged, layout: Layout, kept: tuple[Kept, Kept], target: float
) -> Guarded:
    """Replaces the lists of groups whose guarded row keeps too little, by what the lists and the
    wider lists keep."""
    better = torch.where(kept[1].enough(target), 1, 2)
    level = torch.where(kept[0].enough(target), 0, better)
    tiles = layout.chunk_tiles
    begin = layout.begin[:, None]
    tile = begin // TILE + torch.arange(tiles, device=layout.device)
    group = tile // GROUP_TILES - begin // GROUP
    shape = (-1, lists.count.shape[1], -1)
    slot = (group // stride_of(layout)).clamp(max=level.shape[2] - 1)[:, None].expand(shape)
    of = level.gather(2, slot)
    group = group.clamp(max=wider.count.shape[2] - 1)[:, None].expand(shape)
    blocks = layout.blocks
    every = whole_entries(torch.arange(blocks, device=layout.device))
    values = torch.cat([lists.values, wider.values, every])
    base = lists.values.numel()
    all_of_it = (2 * tile + 2).clamp(max=blocks)[:, None].expand_as(of)
    count = torch.where(of == 1, wider.count.gather(2, group), lists.count)
    count = torch.where((of == 2) & (lists.count > 0), all_of_it, count)
    start = torch.where(of == 1, wider.start.gather(2, group) + base, lists.start)
    start = torch.where(of == 2, base + wider.values.numel(), start)
    return Guarded(Ragged(values, start, count.to(torch.int32)), kept[0].recall, level)
