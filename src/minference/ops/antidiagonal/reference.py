"""XAttention's block scores, as its paper writes them (arXiv 2503.16428, algorithm 1).

A strided row is a run of `stride` queries, a strided column one of `stride` keys. Their score is
the sum along the antidiagonal that the two runs span: the last query with the first key, and so on.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minference.index import TILE
from minference.ops.scores import softcapped


def strided_scores(
    q: Float[Tensor, "rows stride D"], k: Float[Tensor, "columns stride D"], scale: float
) -> Float[Tensor, "rows columns"]:
    """Mean score of each antidiagonal."""
    stride = q.shape[1]
    scores = torch.zeros(len(q), len(k))
    for i in range(stride):
        scores += q[:, stride - 1 - i].float() @ k[:, i].float().T
    return scores * scale / stride


def antidiagonal_masses(
    q: Float[Tensor, "P D"],
    k: Float[Tensor, "P D"],
    *,
    stride: int,
    scale: float,
    softcap: float = 0.0,
    begin: int = 0,
) -> Float[Tensor, "tiles tiles"]:
    """Softmax weights of the strided scores, summed over tiles of 128, of one head's whole prompt.

    Rows before `begin`, and those of the last tile that do not exist, count as zeros; strided rows
    without any query have no weight.
    """
    length = q.shape[0]
    tiles = -(-length // TILE)
    room = (0, 0, 0, tiles * TILE - length)
    real = torch.zeros(tiles * TILE, dtype=torch.bool)
    real[begin:length] = True
    rows, columns = (torch.nn.functional.pad(x, room).unflatten(0, (-1, stride)) for x in (q, k))
    rows = rows * real.unflatten(0, (-1, stride))[..., None]
    scores = softcapped(strided_scores(rows, columns, scale), softcap)
    later = torch.ones_like(scores, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -torch.inf).softmax(dim=-1)
    weights *= real.unflatten(0, (-1, stride)).any(dim=-1)[:, None]
    size = TILE // stride
    return weights.unflatten(1, (-1, size)).sum(dim=2).unflatten(0, (-1, size)).sum(dim=1)


def covering_tiles(
    masses: Float[Tensor, "tiles tiles"], threshold: float
) -> Bool[Tensor, "tiles tiles"]:
    """For each tile the first key tile and its own; then those of most mass, until the chosen ones
    hold the share `threshold` of the row."""
    chosen = torch.zeros_like(masses, dtype=torch.bool)
    for t, row in enumerate(masses):
        order = sorted(range(t + 1), key=lambda j: -float(row[j]))
        best = list(dict.fromkeys([0, t, *order]))
        held = torch.zeros(())
        for rank, j in enumerate(best):
            if rank >= len({0, t}) and (held >= threshold * row.sum() or row[j] == 0):
                break
            chosen[t, j] = True
            held = held + row[j]
    return chosen
