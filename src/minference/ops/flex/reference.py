"""FlexPrefill's choice of key tiles for one head, as its paper writes it (arXiv 2502.20766).

Algorithm 2 tells heads whose pooled scores foresee the last queries' attention from heads that
need vertical and slash lines; algorithms 3 and 4 choose the fewest lines, or pooled blocks, that
hold the share `gamma` of the attention. Lines are spent as whole tiles: n lines buy n // 128 + 1
of them, the best by their sum.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minference.index import TILE
from minference.ops.scores import softcapped


def tile_means(x: Float[Tensor, "P D"]) -> Float[Tensor, "tiles D"]:
    """Mean of the rows of each tile."""
    return torch.stack([part.float().mean(dim=0) for part in x.split(TILE)])


def tile_sums(weights: Float[Tensor, " P"]) -> Float[Tensor, " tiles"]:
    """Sum over each tile."""
    return torch.stack([part.sum() for part in weights.split(TILE)])


def divergence(p: Float[Tensor, " n"], q: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Square root of the Jensen-Shannon divergence."""
    middle = (p + q) / 2
    parts = [torch.where(x > 0, x * (x / middle).log(), 0.0).sum() for x in (p, q)]
    return (0.5 * parts[0] + 0.5 * parts[1]).clamp(min=0).sqrt()


def lines_needed(weights: Float[Tensor, " n"], gamma: float) -> int:
    """Fewest entries that hold the share `gamma`."""
    held, need = 0.0, gamma * float(weights.sum())
    for count, weight in enumerate(sorted(weights.tolist(), reverse=True)):
        if held >= need:
            return count
        held += weight
    return len(weights)


def flex_tiles(
    q: Float[Tensor, "P D"],
    k: Float[Tensor, "P D"],
    *,
    gamma: float,
    tau: float,
    least: int,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Bool[Tensor, "tiles tiles"], bool]:
    """Key tiles of every query tile of a whole prompt, and whether the head is query-aware."""
    length = len(q)
    last = q[-TILE:].float()
    scores = softcapped(last @ k.float().T * scale, softcap)
    later = torch.arange(length) > torch.arange(length - len(last), length)[:, None]
    weights = scores.masked_fill(later, -torch.inf).softmax(dim=-1)
    columns = weights.mean(dim=0)
    slashes = torch.zeros(length)
    for row, own in enumerate(weights):
        position = length - len(last) + row
        slashes[: position + 1] += own[: position + 1].flip(0) / len(last)
    pooled = softcapped(last.mean(dim=0) @ tile_means(k).T * scale, softcap).softmax(dim=-1)
    aware = bool(divergence(pooled, tile_sums(columns)) < tau)
    tiles = len(pooled)
    chosen = torch.zeros(tiles, tiles, dtype=torch.bool)
    for line, kind in ((columns, "column"), (slashes, "slash")):
        budget = least if aware else max(least, lines_needed(line, gamma) // TILE + 1)
        sums = tile_sums(line)
        sums[0] = torch.inf
        for number in sums.sort(descending=True, stable=True).indices[:budget].tolist():
            for tile in range(number, tiles):
                chosen[tile, number if kind == "column" else tile - number] = True
    if aware:
        scores = softcapped(tile_means(q) @ tile_means(k).T * scale, softcap)
        future = torch.ones_like(chosen).triu(1)
        share = scores.masked_fill(future, -torch.inf).softmax(dim=-1).flatten() / tiles
        best = share.sort(descending=True, stable=True).indices[: lines_needed(share, gamma)]
        chosen.view(-1)[best] = True
    return chosen, aware
