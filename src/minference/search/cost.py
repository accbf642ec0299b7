"""What a pattern costs: the blocks and columns that the kernels compute for it, weighed by their
times on a device where those were measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from minference.index import BLOCK, TILE
from minference.lengths import causal_pairs
from minference.ops.select.api import LOCAL_BAND, SINK_COLUMNS
from minference.ops.select.lists import local_offsets, offset_budget
from minference.patterns import AShape, BlockSparse, Dense, Pattern, VerticalSlash

UNION = 1.3
"""Blocks that a tile of 128 rows lists for each that one of its halves of 64 rows chose: 1.07 to
1.73 in the heads of the shipped model at 8K tokens, for 5 to 40 blocks a half, 1.3 on average."""
FAR = 0.36
"""Share of its tiles in which an offset lies before the prompt's first key, where a head takes few
of them: slashes may be far from the diagonal. 0.22 to 0.39 in the shipped model at 8K tokens, for
10 to 35 offsets; 0.36 fits kernel times at 32K and 128K. None where every offset is taken."""


@dataclass(frozen=True)
class Work:
    """What a kernel does for a head: tiles of 128 rows, and 128 x 64 products of each sort.

    Attributes:
        tiles: tiles of rows.
        blocks: blocks named by offsets, the diagonal's two included.
        listed: blocks named one by one, as those of sinks and of block-sparse heads.
        columns: packed columns, in units of 64.
    """

    tiles: float = 0.0
    blocks: float = 0.0
    listed: float = 0.0
    columns: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self.counts(), other.counts(), strict=True)))

    def counts(self) -> tuple[float, float, float, float]:
        return self.tiles, self.blocks, self.listed, self.columns


def tile_work(pattern: Pattern, length: int) -> Work:
    """Work of the last tile of a prompt of `length` tokens.

    Raises:
        TypeError: a pattern that search does not weigh.
    """
    every = -(-length // BLOCK)
    match pattern:
        case Dense():
            return Work(1, every)
        case AShape(sink=sink, local=local):
            blocks = min(local_offsets(local), every)
            return Work(1, blocks, min(-(-sink // BLOCK), every - blocks))
        case VerticalSlash(vertical=vertical, slash=slash):
            blocks = min(max(offset_budget(slash), local_offsets(LOCAL_BAND)), every)
            return Work(1, blocks, 0, min(max(vertical, SINK_COLUMNS) / BLOCK, every))
        case BlockSparse(topk=topk, block=block):
            blocks = max(2, topk) * (UNION if block == BLOCK else block / BLOCK)
            return Work(1, 0, min(blocks, every))
        case _:
            raise TypeError(
                f"the cost of {type(pattern).__name__} is not modelled; search weighs A-shape, "
                "vertical-slash, block-sparse and dense heads"
            )


def prompt_work(pattern: Pattern, length: int) -> Work:
    """Work of all tiles of a prompt: a tile cannot compute more than lies before it, columns are
    taken to lie anywhere, and those inside blocks are not computed again."""
    tiles, last = -(-length // TILE), tile_work(pattern, length)
    blocks = _reached(last.blocks, tiles)
    if isinstance(pattern, VerticalSlash):
        blocks *= 1 - FAR * max(0.0, 1 - last.blocks / (2 * tiles))
    alone = 1 - blocks / _reached(2 * tiles, tiles)
    return Work(tiles, blocks, _reached(last.listed, tiles), last.columns * tiles / 2 * alone)


def _reached(count: float, tiles: int) -> float:
    """Sum over tiles t of min(count, 2 t + 2)."""
    short = min(tiles, int(count / 2))
    return short * (short + 1) + count * (tiles - short)


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Times of this library's kernels on a device, in seconds, as `timing.fit_timings` fits them.

    Attributes:
        device: name of the device.
        heads: query heads of the layer that was timed.
        launch: time of a call that computes nothing.
        tile: time of a tile of rows; block, listed, column: of the products in `Work`.
        index: for each pattern kind, the time that building a layer's index takes at no tokens, and
            what it takes more for each token.
        dense: time of dense attention for each pair of a tile of rows and a block of keys.
        residual: median error of the fitted times, relative; worst: the largest.
        measured: number of times fitted to.
    """

    device: str
    heads: int
    launch: float
    tile: float
    block: float
    listed: float
    column: float
    index: Mapping[str, tuple[float, float]]
    dense: float
    residual: float
    worst: float
    measured: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Timings:
        index = {kind: (float(a), float(b)) for kind, (a, b) in data["index"].items()}
        return cls(**{**data, "index": index})

    def kernel_seconds(self, works: Iterable[Work]) -> float:
        """Predicted time of a layer's attention, its index not included."""
        total = sum(works, Work())
        weights = self.tile, self.block, self.listed, self.column
        return self.launch + sum(a * b for a, b in zip(weights, total.counts(), strict=True))

    def layer_seconds(self, patterns: Sequence[Pattern], length: int) -> float:
        """Predicted time of a layer's attention, its index included."""
        kernel = self.kernel_seconds(prompt_work(p, length) for p in patterns)
        kinds = {p.kind for p in patterns} & self.index.keys()
        return kernel + sum(self.index[k][0] + self.index[k][1] * length for k in kinds)

    def dense_seconds(self, heads: int, length: int) -> float:
        """Predicted time of a layer's dense attention."""
        return self.dense * heads * prompt_work(Dense(), length).blocks


@dataclass(frozen=True)
class CostModel:
    """Cost of patterns in units of one key inside a block that an offset names.

    Attributes:
        timings: a device's; without them every key costs the same, so that tiles are counted.
    """

    timings: Timings | None = field(default=None)

    @property
    def listed(self) -> float:
        """Cost of a key in a block that is named alone."""
        return 1.0 if self.timings is None else self.timings.listed / self.timings.block

    @property
    def column(self) -> float:
        """Cost of a packed column."""
        return 1.0 if self.timings is None else self.timings.column / self.timings.block

    def row_cost(self, pattern: Pattern, length: int) -> float:
        """Cost of a row of a prompt of `length` tokens on average, the index not included."""
        work = prompt_work(pattern, length)
        keys = work.blocks + self.listed * work.listed + self.column * work.columns
        return BLOCK * keys / work.tiles

    def density(self, pattern: Pattern, length: int) -> float:
        """Predicted share of the causal area of a prompt that is computed, at most 1."""
        work = prompt_work(pattern, length)
        products = work.blocks + work.listed + work.columns
        diagonal = work.tiles
        if isinstance(pattern, BlockSparse):
            # halves of 64 rows, each with blocks of its own
            scale = pattern.block // BLOCK
            halves = -(-length // BLOCK)
            products = _reached(2 * scale * max(2, pattern.topk), halves) / 4
            diagonal = halves / 4
        # of the blocks on the diagonal half the pairs are causal
        keys = BLOCK * (products - diagonal)
        return min(1.0, keys * TILE / causal_pairs(length, length))

    def mean_density(self, rows: Iterable[Sequence[Pattern]], length: int) -> float:
        """Mean of `density` over the heads of a table."""
        heads = [self.density(p, length) for row in rows for p in row]
        return sum(heads) / len(heads)

    def speedup(self, rows: Sequence[Sequence[Pattern]], length: int) -> float:
        """Predicted gain over dense attention, index included; where nothing was timed, the inverse
        of the density, which no implementation can beat."""
        if self.timings is None:
            return 1 / self.mean_density(rows, length)
        own = sum(self.timings.layer_seconds(row, length) for row in rows)
        return sum(self.timings.dense_seconds(len(row), length) for row in rows) / own

    def describe(self) -> str:
        """One phrase for the record of a search."""
        if self.timings is None:
            return "cost in counted tiles"
        return (
            f"cost fitted to {self.timings.measured} times on {self.timings.device}, median "
            f"residual {self.timings.residual:.1%}: a key of a listed block {self.listed:.2f}, a "
            f"column {self.column:.2f}"
        )
