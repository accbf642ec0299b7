"""The last rows of a call, which it is most often made for: lists of their own."""

import torch

from minference.index import TILE, Ragged
from minference.ops.build import Layout
from minference.ops.groups.plan import GROUP, GROUP_TILES


def last_layout(layout: Layout, rows: int) -> Layout:
    """The call's last `rows` rows as a call of their own, and as many more as may be missing of the
    first one's group."""
    return Layout(layout.first, layout.stop, min(layout.q_len, rows + GROUP - 1), layout.kv_len)


def put_last(lists: Ragged, last: Ragged, layout: Layout, own: Layout) -> Ragged:
    """The lists of a call's tiles, with `last`, lists of the tiles of `own`, in the place of those
    of its whole groups."""
    begin, own_begin = (x.begin[:, None] for x in (layout, own))
    tile = begin // TILE + torch.arange(layout.chunk_tiles, device=layout.device)
    slot = (tile - own_begin // TILE).clamp(0, last.count.shape[2] - 1)
    slot = slot[:, None].expand(-1, lists.count.shape[1], -1)
    there = (tile // GROUP_TILES * GROUP >= own_begin)[:, None]
    start = last.start.gather(2, slot) + lists.values.numel()
    return Ragged(
        torch.cat([lists.values, last.values]),
        torch.where(there, start, lists.start),
        torch.where(there, last.count.gather(2, slot), lists.count),
    )
