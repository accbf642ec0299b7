"""How much of the causal area a chunk's index computes, from a few tiles. Needs no vLLM."""

from __future__ import annotations

from minference.index import TILE, SparseIndex
from minference.index_tiles import computed_pairs
from minference.lengths import causal_pairs


def sampled_density(index: SparseIndex, tiles: int = 4) -> float:
    """Share of the causal area that is computed, over evenly spaced query tiles of each head.

    Exact for chunks of at most `tiles` tiles; waits for the index's device.
    """
    own = index.tiles(0)
    step = max(1, -(-len(own) // tiles))
    rows = index.rows(0)
    computed, area = [], 0
    for tile in own[step // 2 :: step] or own[:1]:
        a, z = max(rows.start, tile * TILE), min(rows.stop, (tile + 1) * TILE)
        area += index.heads * causal_pairs(z - a, z)
        computed.append(computed_pairs(index, 0, range(tile, tile + 1)).sum())
    return float(sum(computed)) / area if area else 1.0
