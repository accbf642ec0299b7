"""What every implementation of the grouped estimate shares: its grid and where its rows lie."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from minference.index import BLOCK, TILE
from minference.ops.build import Layout

GROUP_TILES = 4
"""Query tiles of a group; groups are anchored at position 0."""

GROUP = GROUP_TILES * TILE
"""Query rows of a group."""

CELL = 4
"""Keys whose mean speaks for them where a group's candidates are chosen."""

EDGE = 8
"""Keys on either side of a block that count for it too: the most that a run of neighbouring keys,
looked up by neighbouring rows, can go on between two sampled rows."""

ALWAYS = 4
"""Blocks that every tile keeps: block 0, its own two and the one before them."""

WIDER = 1 / 8
"""Entries of the guard's wider lists may be that much weaker than those of the lists."""

LEAST_ROWS = 4 * GROUP_TILES
"""Four rows of each tile."""

LEAST_WIDER = 2 * GROUP_TILES + 2
"""Block 0, the group's own and the one before them are in every wider list."""


@dataclass(frozen=True)
class Plan:
    """What is estimated and kept.

    Attributes:
        rows: sampled rows of a group and query head, a multiple of 16.
        mass: a block in which a sampled row has more than 1 - mass of its attention is kept.
        most: most blocks of a tile, besides those that every tile keeps.
        wider: most blocks of a group's wider list, which the guard turns to.
        candidates: blocks of a group that are rated by their keys, a multiple of 64, its near ones
            among them; 0 for every block.
        cell: keys whose mean speaks for them where candidates are chosen, `CELL` or 1.
    """

    rows: int
    mass: float
    most: int
    wider: int
    candidates: int = 0
    cell: int = CELL


def few_rated(plan: Plan, layout: Layout) -> bool:
    """Whether a group's candidates alone are rated by their keys, and not every block."""
    return 0 < plan.candidates < layout.blocks


def group_count(layout: Layout) -> int:
    """Most groups that the chunk can touch."""
    return min(layout.q_len // GROUP + 2, -(-layout.kv_len // GROUP))


def row_places(rows: int, heads: int) -> Int[Tensor, "heads rows"]:
    """Which of a tile's 128 rows are sampled for each of a KV head's query heads.

    The first and the last one, so that a run of rows that crosses into the next tile shows in
    both; between them evenly spaced ones, for every head others.
    """
    row, head = torch.arange(rows), torch.arange(heads)[:, None]
    place = (TILE - 1) * (2 * heads * row + 2 * head - heads + 1) // (2 * heads * (rows - 1))
    place[:, 0], place[:, -1] = 0, TILE - 1
    return place


def spread_rows(
    layout: Layout, group: int, rows: int, heads: int
) -> Int[Tensor, "B heads tiles rows"]:
    """Positions of the rows that are sampled of a group's tiles for each of a KV head's query
    heads; -1 in tiles without real rows."""
    begin = layout.begin[:, None]
    tile = begin // GROUP * GROUP_TILES + group * GROUP_TILES
    tile = tile + torch.arange(GROUP_TILES, device=layout.device)
    low = torch.maximum(tile * TILE, begin)
    stop = torch.minimum((tile + 1) * TILE, (layout.stop - layout.first)[:, None])
    low, stop = low[:, None, :, None], stop[:, None, :, None]
    place = row_places(rows // GROUP_TILES, heads).to(layout.device)[:, None]
    return torch.where(low < stop, low + place * (stop - low - 1) // (TILE - 1), -1)


def list_room(layout: Layout, entries: int) -> int:
    """Entries that a list has room for: a power of two."""
    return min(power_of_two(entries), power_of_two(layout.blocks))


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def seen_room(layout: Layout, group: int, count: int) -> int:
    """Room for the blocks that `count` groups from `group` on see: a power of two."""
    seen = ((layout.kv_len - layout.q_len) // GROUP + group + count) * (GROUP // BLOCK)
    return power_of_two(min(layout.blocks, seen))


def near_blocks(layout: Layout, group: int) -> tuple[Tensor, Tensor]:
    """First of the blocks that every tile of a group may keep anyway, and past the last one that
    it sees; 0 and 0 where it has no real rows. Block 0 is near too."""
    begin = layout.begin
    start = (begin // GROUP + group) * GROUP
    low = torch.maximum(start, begin)
    stop = torch.minimum(start + GROUP, layout.stop - layout.first)
    there = low < stop
    first = (2 * (low // TILE) - 1).clamp(min=0)
    return torch.where(there, first, 0), torch.where(there, -(-stop // BLOCK), 0)
