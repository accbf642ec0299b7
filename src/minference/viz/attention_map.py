"""The attention of one head over a prompt, and the tiles that a method computes of it."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from minference.index import TILE, SparseIndex
from minference.ops.scores import softcapped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELLS = 256
FAINTEST = 1e-7
"""Mean weight of a cell that is drawn as nothing."""


def pooled_attention(
    q: Float[Tensor, "L D"],
    k: Float[Tensor, "N D"],
    *,
    scale: float,
    softcap: float = 0.0,
    cells: int = CELLS,
) -> Float[Tensor, "cells cells"]:
    """Mean causal attention weight of each cell of a square grid over a whole prompt (L = N).

    Computed for a tile of rows at a time; no L x N matrix.

    Raises:
        ValueError: queries that are not those of all the keys.
    """
    length = k.shape[0]
    if q.shape[0] != length:
        raise ValueError(f"the map needs a query for each of {length} keys, got {q.shape[0]}")
    cells = min(cells, length)
    cell = torch.arange(length, device=q.device) * cells // length
    sums = torch.zeros(cells, cells, device=q.device)
    for begin in range(0, length, TILE):
        rows = torch.arange(begin, min(begin + TILE, length), device=q.device)
        scores = softcapped(q[rows].float() * scale @ k[: begin + TILE].float().T, softcap)
        places = torch.arange(scores.shape[1], device=q.device)
        weights = scores.masked_fill(places > rows[:, None], -torch.inf).softmax(dim=-1)
        by_column = torch.zeros(len(rows), cells, device=q.device)
        by_column.index_add_(1, cell[places], weights)
        sums.index_add_(0, cell[rows], by_column)
    size = torch.bincount(cell, minlength=cells).float()
    return sums / (size[:, None] * size)


def computed_cells(
    index: SparseIndex, head: int, cells: int = CELLS
) -> Float[Tensor, "cells cells"]:
    """Share of each cell's pairs that the index computes, for a head of batch row 0."""
    length = index.kv_len
    cells = min(cells, length)
    cell = torch.arange(length, device=index.device) * cells // length
    sums = torch.zeros(cells, cells, device=index.device)
    for tile in index.tiles(0):
        mask = index.tile_mask(0, head, tile)
        rows = torch.arange(tile * TILE, min((tile + 1) * TILE, length), device=index.device)
        mask = mask[: len(rows), :length].float()
        by_column = torch.zeros(len(rows), cells, device=index.device)
        by_column.index_add_(1, cell[: mask.shape[1]], mask)
        sums.index_add_(0, cell[rows], by_column)
    size = torch.bincount(cell, minlength=cells).float()
    return sums / (size[:, None] * size)


def attention_figure(
    weights: Float[Tensor, "cells cells"],
    computed: Float[Tensor, "cells cells"],
    *,
    length: int,
    title: str,
) -> "Figure":
    """Left: where the head looks, in log colours. Right: the same, what is not computed greyed out.

    Args:
        weights: mean attention weight of each cell.
        computed: share of each cell that is computed.
        length: tokens along each axis.
        title: the line above both.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.4), layout="constrained")
    shown = weights.cpu().clamp(min=FAINTEST).numpy()
    above = torch.ones_like(computed).triu(1).bool().cpu().numpy()
    scale = LogNorm(FAINTEST, max(float(shown.max()), 10 * FAINTEST))
    extent = (0, length, length, 0)
    panels = figure.subplots(1, 2, sharey=True)
    shown[above] = float("nan")
    for panel, name in zip(panels, ("attention", "computed tiles"), strict=True):
        panel.imshow(shown, norm=scale, cmap="viridis", extent=extent, aspect="equal")
        panel.set_title(name)
        panel.set_xlabel("key position")
    missing = 1 - computed.cpu().clamp(max=1).numpy()
    missing[above] = 0
    grey = torch.full((*computed.shape, 4), 0.93).numpy()
    grey[..., 3] = missing
    panels[1].imshow(grey, extent=extent, aspect="equal")
    panels[0].set_ylabel("query position")
    figure.colorbar(panels[0].images[0], ax=panels, label="mean weight of a cell", shrink=0.85)
    figure.suptitle(title)
    return figure
