"""Rows of query and key tiles by position, and lists of the key tiles that a query tile reads."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minference.index import TILE, Ragged
from minference.ops.build import Layout

ENTRIES = (3, 7)
"""Block entries of key tile 0, both halves of the query tile; those of tile j are 8 j more."""


def key_tiles(layout: Layout) -> int:
    """Most key tiles that a prompt can have."""
    return -(-layout.kv_len // TILE)


def tile_numbers(layout: Layout, tiles: range) -> Int[Tensor, "B tiles"]:
    """Numbers of the chunk's tiles `tiles`, which are counted from its first."""
    own = torch.arange(tiles.start, tiles.stop, device=layout.device)
    return layout.first_tile[:, None] + own


def keys_by_position(
    k: Float[Tensor, "B Hkv N D"], layout: Layout
) -> tuple[Float[Tensor, "B Hkv P D"], Bool[Tensor, "B P"]]:
    """Keys of whole tiles from position 0 on, zeros beyond the last; and which of them are real."""
    position = torch.arange(key_tiles(layout) * TILE, device=k.device)
    place = layout.first[:, None] + position
    real = place < layout.stop[:, None]
    return _rows_at(k, place, real), real


def queries_of_tiles(
    q: Float[Tensor, "B H L D"], layout: Layout, tiles: range
) -> tuple[Float[Tensor, "B H R D"], Bool[Tensor, "B R"]]:
    """All rows of the chunk's tiles `tiles`, zeros for those that the chunk does not hold; and
    which of them it holds."""
    row = torch.arange(TILE, device=q.device)
    position = (tile_numbers(layout, tiles)[..., None] * TILE + row).flatten(1)
    shift = layout.kv_len - layout.q_len
    place = layout.first[:, None] + position
    real = (place >= shift) & (place < layout.stop[:, None])
    return _rows_at(q, place - shift, real), real


def _rows_at(x: Tensor, place: Tensor, real: Tensor) -> Tensor:
    shape = (*x.shape[:2], place.shape[1], x.shape[3])
    wide = place.clamp(0, x.shape[2] - 1)[:, None, :, None].expand(shape)
    return x.gather(2, wide).masked_fill_(~real[:, None, :, None], 0)


def fewest(
    masses: Float[Tensor, "*rows n"], need: Float[Tensor, "*rows 1"]
) -> Bool[Tensor, "*rows n"]:
    """The fewest entries of each row whose sum reaches `need`; never one without mass.

    Sums are in double precision, which is exact here: the order of adding changes nothing.
    """
    ordered, order = masses.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1, dtype=torch.float64) - ordered
    kept = (before < need) & (ordered > 0)
    return torch.zeros_like(kept).scatter_(-1, order, kept)


def unfilled_lists(
    q: Tensor, k: Tensor, first: Tensor, stop: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What `tile_lists` gives for the tiles of a call, without contents: for fake operators."""
    layout = Layout(first, stop, q.shape[2], k.shape[2])
    size = torch.library.get_ctx().new_dynamic_size()
    shape = (*q.shape[:2], layout.chunk_tiles)
    return (
        q.new_empty(size, dtype=torch.int32),
        q.new_empty(shape, dtype=torch.int64),
        q.new_empty(shape, dtype=torch.int32),
    )


def tile_lists(parts: list[Bool[Tensor, "B H _ _"]]) -> Ragged:
    """Lists for groups of one tile, from flags [B, H, tiles, key tiles] of what runs of tiles read,
    one run after another. Waits for the device: the lists take no more room than they need."""
    values, starts, counts, total = [], [], [], 0
    entries = torch.tensor(ENTRIES, device=parts[0].device)
    for flags in parts:
        own = flags.flatten().nonzero()[:, 0] % flags.shape[-1]
        count = flags.sum(dim=-1)
        start = count.flatten().cumsum(dim=0).view_as(count) - count
        values.append((8 * own[:, None] + entries).flatten().to(torch.int32))
        starts.append(total + 2 * start)
        counts.append(2 * count)
        total += len(values[-1])
    count = torch.cat(counts, dim=2).to(torch.int32)
    return Ragged(torch.cat(values), torch.cat(starts, dim=2), count)
