"""Blocks re-estimated for each group of 512 query rows, coarse to fine, kept by attention mass."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from minference.index import BLOCK, SparseIndex
from minference.methods.base import Context, Method
from minference.ops.build import Layout, assemble
from minference.ops.groups.api import grouped_blocks, guard_blocks
from minference.ops.groups.plan import MIN_FLOOR, Plan, power_of_two

FULL_RATE = 1 << 17
"""Longest context whose keys are rated by cells of the length asked for."""


@dataclass(frozen=True, kw_only=True)
class Grouped(Method):
    """Key blocks of each query tile, one list for the query heads of a KV head.

    Attributes:
        mass: share of the sampled rows' attention that the kept blocks hold.
        rows: evenly spaced rows of a group of 512 that are scored.
        cell: keys whose mean stands for them when candidates are chosen, 1 to 64; in proportion
            more beyond 128K keys.
        floor: candidate blocks that every group scores exactly, and
        share: more of them, as a share of the blocks that it can see.
        cap: most candidate blocks.
        target: groups in which a row that was not sampled keeps less than this share of its
            attention get all their candidates, and if that is not enough every block; 0 for no
            such guard.
    """

    name: ClassVar[str] = "grouped"
    mass: float = 0.9
    rows: int = 64
    cell: int = 4
    floor: int = 48
    share: float = 0.1
    cap: int = 256
    target: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mass <= 1:
            raise ValueError(f"mass must be a share in (0, 1], got {self.mass}")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be in [0, 1], got {self.share}")
        if not 0 <= self.target <= 1:
            raise ValueError(f"target must be a share in [0, 1], got {self.target}")
        if self.rows < 1:
            raise ValueError(f"rows must be at least 1 row a group, got {self.rows}")
        if self.cell not in (1, 2, 4, 8, 16, 32, 64):
            raise ValueError(f"cell must be a power of two of keys up to 64, got {self.cell}")
        if not MIN_FLOOR <= self.floor <= self.cap:
            raise ValueError(
                f"floor must be {MIN_FLOOR} blocks to cap = {self.cap}, got {self.floor}"
            )

    def plan(self, layout: Layout) -> Plan:
        """What is estimated and kept of a call.

        Beyond 128K keys cells grow with the context, up to 64 keys at 2M, so that the coarse pass
        grows with its length and not with the square.
        """
        cell = min(BLOCK, self.cell * power_of_two(-(-layout.kv_len // FULL_RATE)))
        return Plan(
            rows=self.rows,
            cell=cell,
            sum_cell=min(BLOCK, 4 * cell),
            floor=self.floor,
            share=self.share,
            cap=self.cap,
            mass=self.mass,
        )

    def build_index(self, q: Tensor, k: Tensor, context: Context) -> SparseIndex:
        layout = context.layout
        how = {"scale": context.scale, "softcap": context.softcap, "impl": context.impl}
        lists, candidates = grouped_blocks(q, k, layout, self.plan(layout), **how)
        if self.target:
            lists = guard_blocks(q, k, lists, candidates, layout, target=self.target, **how).lists
        return assemble(layout, k.shape[1], blocks=lists, group_tiles=1)
