"""What the attention benchmark plants: bands, clustered and scattered slashes, columns.

Case VS-1: distances 0..2047, 16 clusters of 253 distances that start anywhere in [2048, N / 2),
1000 columns anywhere; 32 query heads, each with lines of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minference.head_patterns import HeadPatterns
from minference.index import SparseIndex
from minference.ops.build import Layout, assemble
from minference.ops.select.lists import columns_from_positions, lines_to_offsets
from minference.patterns import VerticalSlash
from minference.testing import Lines, random_lines

CLUSTER = 253
SEEDS = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Case:
    """Lines of every head, and the budgets that would estimate as many."""

    name: str
    lines: tuple[Lines, ...]
    verticals: tuple[int, ...]
    slashes: tuple[int, ...]


def vs1(length: int, heads: int, seed: int) -> Case:
    """Case VS-1; below 8K tokens its band is cut to a quarter of the length."""
    band = min(2048, length // 4)
    columns = min(1000, length // 4)
    lines = tuple(
        random_lines(
            length, columns=columns, clusters=16, width=CLUSTER, band=band, seed=1000 * seed + h
        )
        for h in range(heads)
    )
    return Case(f"vs1-seed{seed}", lines, (columns,) * heads, (band + 16 * CLUSTER,) * heads)


def scattered(length: int, heads: int, seed: int) -> Case:
    """As many single slashes as a budget of 6096 buys offsets for when each falls alone."""
    lines = tuple(
        random_lines(length, columns=1000, clusters=30, width=1, band=2048, seed=1000 * seed + h)
        for h in range(heads)
    )
    return Case(f"scattered-seed{seed}", lines, (1000,) * heads, (6096,) * heads)


def heads_to_plant(name: str, layer: int) -> tuple[VerticalSlash, ...]:
    """The heads of one layer of a published table.

    Raises:
        ValueError: no such layer, or one with heads of another kind than vertical-slash.
    """
    layers = HeadPatterns.from_pretrained(name).patterns
    if not 0 <= layer < len(layers):
        raise ValueError(f"{name} has layers 0 to {len(layers) - 1}, got {layer}")
    own = tuple(p for p in layers[layer] if isinstance(p, VerticalSlash))
    if len(own) < len(layers[layer]):
        wrong = next(p for p in layers[layer] if not isinstance(p, VerticalSlash))
        raise ValueError(
            f"layer {layer} of {name} must hold vertical-slash heads alone to be planted, got "
            f"{type(wrong).__name__}; choose another layer"
        )
    return own


def table(name: str, layer: int, length: int, seed: int) -> Case:
    """The heads of one layer of a published table, a third of the slashes local."""
    lines, budgets = [], []
    for h, pattern in enumerate(heads_to_plant(name, layer)):
        budgets.append((pattern.vertical, pattern.slash))
        band = max(1, pattern.slash // 3)
        lines.append(
            random_lines(
                length,
                columns=pattern.vertical,
                clusters=(pattern.slash - band) // CLUSTER,
                width=CLUSTER,
                band=band,
                seed=1000 * seed + h,
            )
        )
    verticals, slashes = zip(*budgets, strict=True)
    return Case(f"{name.split('/')[-1]}-layer{layer}", tuple(lines), verticals, slashes)


def planted_index(case: Case, layout: Layout) -> SparseIndex:
    """The index that covers exactly the case's lines."""
    heads, device = len(case.lines), layout.device
    widest = max(len(own.distances) for own in case.lines)
    most = max(len(own.columns) for own in case.lines)
    distances = torch.full((1, heads, widest), -1)
    columns = torch.full((1, heads, most), -1)
    for h, own in enumerate(case.lines):
        distances[0, h, : len(own.distances)] = own.distances
        columns[0, h, : len(own.columns)] = own.columns
    return assemble(
        layout,
        heads,
        offsets=lines_to_offsets(distances.to(device), layout.kv_len),
        columns=columns_from_positions(columns.to(device), layout.kv_len),
    )
