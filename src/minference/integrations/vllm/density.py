"""How much of the causal area a chunk's index computes, from a few tiles. Needs no vLLM."""

from __future__ import annotations

import torch

from minference.index import BLOCK, TILE, SparseIndex


def sampled_density(index: SparseIndex, tiles: int = 4) -> float:
    """Share of the causal area that is computed, over evenly spaced query tiles of each head.

    Exact for chunks of at most `tiles` tiles; reads the index on the host.
    """
    own = list(index.tiles(0))
    step = max(1, -(-len(own) // tiles))
    rows = index.rows(0)
    computed = area = 0
    for tile in own[step // 2 :: step] or own[:1]:
        a, z = max(rows.start, tile * TILE), min(rows.stop, (tile + 1) * TILE)
        area += index.heads * sum(range(a + 1, z + 1))
        queries = torch.arange(a, z, device=index.device)
        for head in range(index.heads):
            halves = index.tile_blocks(0, head, tile)
            columns = index.tile_columns(0, head, tile, halves)
            computed += int((queries[:, None] >= columns).sum())
            for half in (0, 1):
                diagonal = 2 * tile + half
                part = queries[queries // BLOCK == diagonal]
                chosen = (halves & (1 + half)) != 0
                computed += len(part) * BLOCK * int(chosen[:diagonal].sum())
                computed += int(chosen[diagonal]) * int((part - diagonal * BLOCK + 1).sum())
    return computed / area if area else 1.0
