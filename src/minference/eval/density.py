"""Density by layer of a prefill, seen from inside the method: a secretly dense one shows 1.0."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minference.index import BLOCK, TILE, Ragged, SparseIndex
from minference.methods.base import Context, Method


@dataclass(frozen=True, kw_only=True)
class Recorder(Method):
    """Passes every call on to `inner` and keeps the index that came back, by layer."""

    name: ClassVar[str] = "recorder"
    inner: Method
    indices: dict[int, SparseIndex | None] = field(default_factory=dict, compare=False)

    @classmethod
    def around(cls, inner: Method) -> Recorder:
        """A recorder with the inner method's threshold."""
        return cls(inner=inner, min_seq_len=inner.min_seq_len)

    def build_index(self, q: Tensor, k: Tensor, context: Context) -> SparseIndex | None:
        index = self.inner.build_index(q, k, context)
        self.indices[context.layer] = index
        return index

    def densities(self, layers: int) -> list[float]:
        """Density of each layer; 1.0 where the method was not asked or asked for dense."""
        found = (self.indices.get(layer) for layer in range(layers))
        return [
            1.0 if index is None else round(float(head_density(index).mean()), 5) for index in found
        ]


def head_density(index: SparseIndex) -> Float[Tensor, "B H"]:
    """What `SparseIndex.head_density` counts, for whole prompts at once on the index's device.

    Needs a table of query tiles by key blocks a head: 8 MB at 128K tokens.
    """
    result = torch.ones(index.batch, index.heads, dtype=torch.float64)
    for b in range(index.batch):
        rows = index.rows(b)
        area = (rows.start + 1 + rows.stop) * len(rows) // 2
        for h in range(index.heads):
            if area:
                result[b, h] = _pairs(index, b, h) / area
    return result


def _pairs(index: SparseIndex, b: int, h: int) -> int:
    rows, tiles = index.rows(b), index.tiles(b)
    tile = torch.arange(tiles.start, tiles.stop, device=index.device)
    halves = _halves(index, b, h, tile, 2 * tiles.stop)
    begin = (tile * TILE).clamp(min=rows.start)
    end = ((tile + 1) * TILE).clamp(max=rows.stop)
    columns = index.columns.row(b, h).long()
    columns = columns[columns < 2 * tiles.stop * BLOCK]
    alone = halves[:, columns // BLOCK] == 0
    below = (end[:, None] - torch.maximum(begin[:, None], columns)).clamp(min=0)
    pairs = (below * alone).sum()
    number = torch.arange(halves.shape[1], device=index.device)
    for half in (0, 1):
        own = 2 * tile + half
        low = (own * BLOCK).clamp(min=rows.start)
        high = torch.maximum(((own + 1) * BLOCK).clamp(max=rows.stop), low)
        chosen = (halves & (1 + half)) != 0
        full = (chosen & (number < own[:, None])).sum(1)
        first, last = low - own * BLOCK + 1, high - own * BLOCK
        diagonal = (first + last) * (high - low) // 2
        own_chosen = chosen.gather(1, own[:, None])[:, 0]
        pairs = pairs + ((high - low) * BLOCK * full + own_chosen * diagonal).sum()
    return int(pairs)


def _halves(
    index: SparseIndex, b: int, h: int, tile: Int[Tensor, " T"], blocks: int
) -> Int[Tensor, "T blocks"]:
    """Row halves (0..3) in which each tile attends to each key block, before masks."""
    halves = torch.zeros(len(tile), blocks, dtype=torch.int32, device=index.device)
    size = int(index.group_tiles[h])
    group = tile // size - (max(index.query_start(b), 0) // TILE) // size
    row, entry = _entries(index.blocks, b, h, group)
    kept = entry // 4 <= 2 * tile[row] + 1
    halves[row[kept], entry[kept] // 4] = (entry[kept] % 4).to(torch.int32)
    row, offset = _entries(index.offsets, b, h, group)
    block = 2 * tile[row] - offset
    kept = block >= 0
    halves[row[kept], block[kept]] = 3
    return halves


def _entries(
    lists: Ragged, b: int, h: int, group: Int[Tensor, " T"]
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Every entry of the list that each tile reads, with the tile's place."""
    groups = lists.count.shape[2]
    inside = group.clamp(max=groups - 1)
    count = torch.where(group < groups, lists.count[b, h, inside].long(), 0)
    start = lists.start[b, h, inside].long()
    row = torch.repeat_interleave(torch.arange(len(group), device=group.device), count)
    before = count.cumsum(0) - count
    place = torch.arange(len(row), device=group.device) - before[row]
    return row, lists.values[start[row] + place].long()
