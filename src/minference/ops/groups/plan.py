"""What every implementation of the grouped estimate shares: its grid and where its rows lie."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from minference.index import TILE
from minference.ops.build import Layout

GROUP_TILES = 4
"""Query tiles of a group; groups are anchored at position 0."""

MIN_FLOOR = 16
"""Least candidates: the local blocks of a whole group and block 0 must be among them."""


@dataclass(frozen=True)
class Plan:
    """What is estimated and kept.

    Attributes:
        rows: sampled rows of a group.
        cell: keys whose mean stands for them when candidates are rated, and
        sum_cell: when a row's attention over all keys is summed; powers of two up to 64, the
            second no smaller.
        floor: candidate blocks of every group, and
        share: more of them, as a share of the blocks that the group can see.
        cap: most candidate blocks.
        mass: share of the sampled attention that the kept blocks hold.
    """

    rows: int
    cell: int
    sum_cell: int
    floor: int
    share: float
    cap: int
    mass: float


def group_count(layout: Layout) -> int:
    """Most groups that the chunk can touch."""
    rows = GROUP_TILES * TILE
    return min(layout.q_len // rows + 2, -(-layout.kv_len // rows))


def spread_rows(
    layout: Layout, group: int, rows: int
) -> tuple[Int[Tensor, "B rows"], Bool[Tensor, " B"]]:
    """Evenly spaced positions among a group's real rows, and whether the group has any."""
    size = GROUP_TILES * TILE
    begin = layout.kv_len - layout.q_len - layout.first
    group_start = (begin.clamp(min=0) // size + group) * size
    a = torch.maximum(group_start, begin.clamp(min=0))
    z = torch.minimum(group_start + size, layout.stop - layout.first)
    step = 2 * torch.arange(rows, device=layout.device) + 1
    positions = a[:, None] + step * (z - a).clamp(min=0)[:, None] // (2 * rows)
    return positions, z > a


def list_room(layout: Layout, cap: int) -> int:
    """Entries that a tile's list has room for: the candidates, in a power of two."""
    blocks = 2 * -(-layout.kv_len // TILE)
    return min(power_of_two(cap), max(MIN_FLOOR, power_of_two(blocks)))


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()
