"""Blocks re-estimated for each group of 512 query rows, kept where a row looks something up."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from minference.index import BLOCK, Ragged, SparseIndex
from minference.methods.base import Context, Method
from minference.ops.build import Layout, assemble
from minference.ops.groups.api import grouped_blocks, guard_blocks
from minference.ops.groups.guard import Guarded
from minference.ops.groups.plan import CELL, GROUP, LEAST_ROWS, LEAST_WIDER, Plan, power_of_two

SHORT = 1 << 15
"""Longest context of which every layer scores the rows asked for: 32K keys."""

FULL_ROWS = 3 << 15
"""Beyond so many keys, 96K, rows become fewer as the context grows."""

LAST_PART = 8
"""Of a call with more rows than `last`, one in so many may be looked at closer."""


@dataclass(frozen=True, kw_only=True)
class Grouped(Method):
    """Key blocks of each query tile, one list for the query heads of a KV head.

    Attributes:
        mass: share of its attention that a row may count on: a block with more than the rest,
            1 - mass, of the attention of some sampled row is kept.
        rows: rows of a group of 512 that are scored for each head; fewer beyond 96K keys, in early
            layers beyond 192K.
        later_rows: behind the early layers at most so many, in contexts of more than 32K keys.
        later_most: and so many blocks (`most`) there, since fewer rows say which.
        candidates: blocks of a group whose keys are scored, chosen by means of 4 keys, in contexts
            of more than twice as many; a multiple of 64, 0 for every block.
        most: most blocks that a tile keeps besides block 0 and the three at the diagonal.
        wider: most blocks of a group that the guard turns to before it takes every block.
        target: groups in which a row that was not sampled keeps less than this share of its
            attention, or misses a block with much of it, get more blocks; 0 for no such guard.
        early: layers, from the first on, that are looked at closer, since rows gather there what
            later layers find them by, from keys that means hide: candidates are chosen by single
            keys, and lists hold up to twice as many blocks, down to half the share.
        early_dense: these layers are dense instead, where no answer may be lost.
        samples: about so many keys stand for those that a tile leaves out
            (`minference.index_samples`), up to twice as many beyond 64K keys, and twice as many in
            early layers; 0 for none.
        first_layer: times as many samples in layer 0, where rows spread their attention over every
            key of a token like theirs.
        sample_share: a sample counts at most as this share of what its row has in its list, or
            once.
        first_share: the same in layer 0.
        last: rows at the end of a call, where a question most often is, that are looked at closer
            in every layer in contexts of more than 32K keys, by all the rows asked for and, behind
            the early layers, by means of twice as many candidates; at most an eighth of a call of
            more rows than these. Not rows padded on the right. 0 for none.
    """

    name: ClassVar[str] = "grouped"
    # on two cores layer 0 takes .9 of dense attention's time here, a later layer .3
    cpu_tokens: ClassVar[int] = 3 << 14
    mass: float = 0.98
    rows: int = 256
    later_rows: int = 64
    later_most: int = 14
    candidates: int = 128
    most: int = 12
    wider: int = 128
    target: float = 0.03
    early: int = 3
    early_dense: bool = False
    samples: int = 256
    first_layer: int = 8
    sample_share: float = 0.02
    first_share: float = 0.1
    last: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mass", "sample_share", "first_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a share in (0, 1], got {getattr(self, name)}")
        if not 0 <= self.target <= 1:
            raise ValueError(f"target must be a share in [0, 1], got {self.target}")
        for name in ("rows", "later_rows"):
            rows = getattr(self, name)
            if not LEAST_ROWS <= rows <= GROUP or rows % LEAST_ROWS:
                raise ValueError(
                    f"{name} must be a multiple of {LEAST_ROWS} up to the {GROUP} of a group, got "
                    f"{rows}"
                )
        if self.candidates < 0 or self.candidates % 64:
            raise ValueError(f"candidates must be a multiple of 64 blocks, got {self.candidates}")
        for name in ("most", "later_most"):
            if getattr(self, name) < 1:
                blocks = getattr(self, name)
                raise ValueError(f"{name} must be at least 1 block a tile, got {blocks}")
        if self.wider < LEAST_WIDER:
            raise ValueError(f"wider must be at least {LEAST_WIDER} blocks, got {self.wider}")
        if self.early < 0:
            raise ValueError(f"early must be at least 0 layers, got {self.early}")
        if self.samples < 0:
            raise ValueError(f"samples must be at least 0 keys, got {self.samples}")
        if self.first_layer < 1:
            raise ValueError(f"first_layer must be at least 1, got {self.first_layer}")
        if self.last < 0:
            raise ValueError(f"last must be at least 0 rows, got {self.last}")

    def plan(self, layout: Layout, layer: int) -> Plan:
        """What is estimated and kept of a call in a layer.

        Rows become fewer as the context grows, at last four a tile, so that the estimate grows
        with its length and not with the square.
        """
        if self.last_rows(layout) == layout.q_len:
            return self.last_plan(layout, layer)
        plan = self._plan(layout)
        if layer < self.early:
            return _closer(plan, min(2 * plan.rows, self.rows))
        if layout.kv_len <= SHORT:
            return plan
        return replace(plan, rows=min(plan.rows, self.later_rows), most=self.later_most)

    def last_rows(self, layout: Layout) -> int:
        """Rows at the end of a call that are looked at closer."""
        if layout.kv_len <= SHORT:
            return 0
        if layout.q_len <= self.last:
            return layout.q_len
        return min(self.last, layout.q_len // LAST_PART)

    def last_plan(self, layout: Layout, layer: int) -> Plan:
        """The same of the last rows of a call in a long context."""
        closer = _closer(self._plan(layout), self.rows)
        if layer < self.early:
            return closer
        # means hide little there, and twice as many of their candidates cost half as much
        return replace(closer, cell=CELL, candidates=2 * closer.candidates)

    def _plan(self, layout: Layout) -> Plan:
        times = power_of_two(-(-layout.kv_len // FULL_ROWS))
        few = layout.kv_len <= 2 * self.candidates * BLOCK
        return Plan(
            rows=max(LEAST_ROWS, self.rows // times // LEAST_ROWS * LEAST_ROWS),
            mass=self.mass,
            most=self.most,
            wider=self.wider,
            candidates=0 if few else self.candidates,
        )

    def build_index(self, q: Tensor, k: Tensor, context: Context) -> SparseIndex | None:
        if self.early_dense and context.layer < self.early:
            return None
        return self.sparse_index(q, k, context)

    def sparse_index(self, q: Tensor, k: Tensor, context: Context) -> SparseIndex:
        """The index of a layer that is not dense."""
        layout, layer = context.layout, context.layer
        plan, closer = self.plan(layout, layer), self.last_plan(layout, layer)
        rows = self.last_rows(layout) if plan != closer else 0
        last = (rows, closer) if rows else None
        lists, wider = grouped_blocks(q, k, layout, plan, last=last, **_how(context))
        if self.target:
            lists = self.guard(q, k, lists, wider, context).lists
        times = 2 if layer < self.early else 1
        return assemble(
            layout,
            k.shape[1],
            blocks=lists,
            group_tiles=1,
            samples=self.samples * (times if layer else self.first_layer),
            sample_share=self.sample_share if layer else self.first_share,
        )

    def guard(
        self, q: Tensor, k: Tensor, lists: Ragged, wider: Ragged, context: Context
    ) -> Guarded:
        """What the guard makes of the lists, and what it saw."""
        layout = context.layout
        return guard_blocks(q, k, lists, wider, layout, target=self.target, **_how(context))


def _closer(plan: Plan, rows: int) -> Plan:
    """So many rows, candidates by single keys, and lists of up to twice as many blocks, down to
    half the share."""
    return replace(plan, rows=rows, mass=(1 + plan.mass) / 2, most=2 * plan.most, cell=1)


def _how(context: Context) -> dict[str, Any]:
    return {"scale": context.scale, "softcap": context.softcap, "impl": context.impl}
