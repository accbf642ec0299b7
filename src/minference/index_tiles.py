"""What many tiles of an index read, heads and tiles at once and on the index's device."""

import itertools

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from minference.index import BLOCK, BOTH_HALVES, TILE, Ragged, SparseIndex
from minference.index_samples import sample_keys, sample_stride

RUN = 256
"""Tiles that are counted at once: the table of 32 heads takes 128 MB at a million tokens."""


def tile_halves(
    index: SparseIndex, b: int, heads: range, tiles: range
) -> Int[Tensor, "H T n_blocks"]:
    """`SparseIndex.tile_blocks` of consecutive heads and tiles, a row each, as long as the last
    tile's."""
    tile = torch.arange(tiles.start, tiles.stop, device=index.device)
    size = index.group_tiles[heads.start : heads.stop, None].long()
    groups = tile // size - (max(index.query_start(b), 0) // TILE) // size
    shape = len(heads), len(tiles), 2 * tiles.stop
    halves = torch.zeros(shape, dtype=torch.int8, device=index.device)
    rows, of_row = halves.view(-1, shape[2]), tile.repeat(len(heads))
    entries, row = _members(index.blocks, b, heads, groups)
    seen = entries // 4 <= 2 * of_row[row] + 1
    rows[row[seen], entries[seen] // 4] = (entries[seen] % 4).to(torch.int8)
    offsets, row = _members(index.offsets, b, heads, groups)
    blocks = 2 * of_row[row] - offsets
    seen = blocks >= 0
    rows[row[seen], blocks[seen]] = BOTH_HALVES
    return halves


def computed_pairs(index: SparseIndex, b: int, tiles: range | None = None) -> Int[Tensor, " H"]:
    """Query-key pairs that each head's blocks, columns and samples hold up to the diagonal, each
    once; of some tiles where these are given."""
    queries, heads = index.rows(b), range(index.heads)
    tiles = index.tiles(b) if tiles is None else tiles
    pairs = torch.zeros(index.heads, dtype=torch.int64, device=index.device)
    every = torch.zeros(index.heads, 1, dtype=torch.int64, device=index.device)
    columns, head = _members(index.columns, b, heads, every)
    for first in range(tiles.start, tiles.stop, RUN):
        run = range(first, min(first + RUN, tiles.stop))
        halves = tile_halves(index, b, heads, run)
        tile = torch.arange(run.start, run.stop, device=index.device)
        begin = (tile * TILE).clamp(min=queries.start)
        end = ((tile + 1) * TILE).clamp(max=queries.stop)
        block = (columns // BLOCK).clamp(max=halves.shape[2] - 1)
        below = (end - torch.maximum(begin, columns[:, None])).clamp(min=0)
        alone = halves[head, :, block] == 0
        pairs.index_add_(0, head, (below * alone).sum(1))
        number = torch.arange(halves.shape[2], device=index.device)
        for half in (0, 1):
            own = 2 * tile + half
            low = (own * BLOCK).clamp(min=queries.start)
            high = torch.maximum(((own + 1) * BLOCK).clamp(max=queries.stop), low)
            chosen = (halves & (1 + half)) != 0
            full = (chosen & (number < own[:, None])).sum(2)
            diagonal = chosen.gather(2, own.expand(len(heads), -1)[..., None])[..., 0]
            # row p of a block on the diagonal sees p + 1 of its keys
            seen = (low + high - 2 * own * BLOCK + 1) * (high - low) // 2
            pairs += ((high - low) * BLOCK * full + diagonal * seen).sum(1)
            if index.samples:
                pairs += ((high - low) * _lone_samples(halves != 0, run, index.samples)).sum(1)
    return pairs


def _lone_samples(
    chosen: Bool[Tensor, "H T n_blocks"], tiles: range, samples: int
) -> Int[Tensor, "H T"]:
    """Samples of each tile that none of its chosen blocks holds."""
    counts = []
    # tiles of one stride are neighbours, and each samples what the one before it does, and more
    for stride, same in itertools.groupby(tiles, lambda tile: sample_stride(tile, samples)):
        own = list(same)
        keys = sample_keys(own[-1], samples, chosen.device)
        runs = torch.tensor(own, device=chosen.device)[:, None] * TILE // stride
        before = torch.arange(len(keys), device=chosen.device) < runs
        here = slice(own[0] - tiles.start, own[-1] + 1 - tiles.start)
        counts.append((~chosen[:, here, keys // BLOCK] & before).sum(2))
    return torch.cat(counts, dim=1)


def _members(
    lists: Ragged, b: int, heads: range, groups: Int[Tensor, "H T"]
) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
    """Values of the lists of several groups of each head, and the number of the group, counted
    through, that each belongs to."""
    there = groups < lists.count.shape[2]
    own = groups.clamp(max=lists.count.shape[2] - 1)
    span = slice(heads.start, heads.stop)
    count = (lists.count[b, span].long().gather(1, own) * there).flatten()
    start = lists.start[b, span].long().gather(1, own).flatten()
    group = torch.repeat_interleave(torch.arange(len(count), device=groups.device), count)
    before = count.cumsum(0) - count
    place = torch.arange(len(group), device=groups.device) - before[group]
    return lists.values[start[group] + place].long(), group
