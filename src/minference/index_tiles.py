"""What many tiles of an index read, a run of tiles at once and on the index's device."""

from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from minference.index import BLOCK, BOTH_HALVES, TILE, Ragged, SparseIndex

RUN = 512
"""Tiles that are counted at once: their table takes 8 MB a head at a million tokens."""


def tile_halves(index: SparseIndex, b: int, h: int, tiles: range) -> Int[Tensor, "T n_blocks"]:
    """`SparseIndex.tile_blocks` of consecutive tiles, a row each, as long as the last one's."""
    tile = torch.arange(tiles.start, tiles.stop, device=index.device)
    size = int(index.group_tiles[h])
    groups = tile // size - (max(index.query_start(b), 0) // TILE) // size
    halves = torch.zeros(len(tiles), 2 * tiles.stop, dtype=torch.int8, device=index.device)
    entries, of = _members(index.blocks, b, h, groups)
    seen = entries // 4 <= 2 * tile[of] + 1
    halves[of[seen], entries[seen] // 4] = (entries[seen] % 4).to(torch.int8)
    offsets, of = _members(index.offsets, b, h, groups)
    blocks = 2 * tile[of] - offsets
    seen = blocks >= 0
    halves[of[seen], blocks[seen]] = BOTH_HALVES
    return halves


def computed_pairs(index: SparseIndex, b: int, h: int) -> int:
    """Query-key pairs that a head's blocks and columns hold up to the diagonal, each once."""
    return sum(int(pairs) for pairs in _pairs(index, b, h))


def _pairs(index: SparseIndex, b: int, h: int) -> Iterator[Tensor]:
    rows, tiles = index.rows(b), index.tiles(b)
    columns = index.columns.row(b, h).long()
    for first in range(tiles.start, tiles.stop, RUN):
        run = range(first, min(first + RUN, tiles.stop))
        halves = tile_halves(index, b, h, run)
        tile = torch.arange(run.start, run.stop, device=index.device)[:, None]
        begin = (tile * TILE).clamp(min=rows.start)
        end = ((tile + 1) * TILE).clamp(max=rows.stop)
        here = columns[columns < run.stop * TILE]
        below = (end - torch.maximum(begin, here)).clamp(min=0)
        yield (below * (halves[:, here // BLOCK] == 0)).sum()
        number = torch.arange(halves.shape[1], device=index.device)
        for half in (0, 1):
            own = 2 * tile + half
            low = (own * BLOCK).clamp(min=rows.start)
            high = torch.maximum(((own + 1) * BLOCK).clamp(max=rows.stop), low)
            chosen = (halves & (1 + half)) != 0
            full = (chosen & (number < own)).sum(1, keepdim=True)
            # row p of a block on the diagonal sees p + 1 of its keys
            seen = (low + high - 2 * own * BLOCK + 1) * (high - low) // 2
            yield ((high - low) * BLOCK * full + chosen.gather(1, own) * seen).sum()


def _members(
    lists: Ragged, b: int, h: int, groups: Int[Tensor, " T"]
) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
    """Values of the lists of several groups, and which of the groups each belongs to."""
    there = groups < lists.count.shape[2]
    own = groups.clamp(max=lists.count.shape[2] - 1)
    count = lists.count[b, h, own].long() * there
    group = torch.repeat_interleave(torch.arange(len(groups), device=groups.device), count)
    ends = count.cumsum(0)
    place = torch.arange(len(group), device=groups.device) - (ends - count)[group]
    return lists.values[lists.start[b, h, own][group] + place].long(), group
