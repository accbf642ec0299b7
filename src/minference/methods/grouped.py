"""Lines re-estimated for each group of 512 query rows, kept by attention mass."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from minference.index import SparseIndex
from minference.methods.base import Context, Method
from minference.ops.build import assemble
from minference.ops.groups.reference import GROUP_TILES, block_lists, group_masses, keep_mass
from minference.ops.select.reference import offsets_from_flags

_LOCAL_SLOTS = 3
"""Offsets -1, 0 and 1: every distance below 65."""


@dataclass(frozen=True, kw_only=True)
class Grouped(Method):
    """Block offsets and key blocks of each group of rows, one index per KV head.

    Attributes:
        mass: share of the sampled rows' attention that the offsets, and also the blocks, keep.
        rows: evenly spaced rows of a group whose scores are computed. Their cost is rows / 512 of
            the dense score product, hence quadratic.
    """

    name: ClassVar[str] = "grouped"
    mass: float = 0.8
    rows: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mass <= 1:
            raise ValueError(f"mass must be a share in (0, 1], got {self.mass}")
        if self.rows < 1:
            raise ValueError(f"rows must be at least 1 row a group, got {self.rows}")

    def build_index(self, q: Tensor, k: Tensor, context: Context) -> SparseIndex:
        by_offset, by_block = group_masses(
            q, k, context.layout, rows=self.rows, scale=context.scale, softcap=context.softcap
        )
        offsets = keep_mass(by_offset, self.mass)
        offsets[..., :_LOCAL_SLOTS] = True
        blocks = keep_mass(by_block, self.mass)
        blocks[..., 0] = True
        return assemble(
            context.layout,
            k.shape[1],
            offsets=offsets_from_flags(offsets),
            blocks=block_lists(blocks),
            group_tiles=GROUP_TILES,
        )
