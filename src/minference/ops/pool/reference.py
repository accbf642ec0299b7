"""Block scores from pooled queries and keys, and each row block's best key blocks.

Block-sparse selection of MInference (arXiv 2407.02490, algorithm 3): means over 64 tokens, scores
by their products, the top blocks of every row block.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minference.index import BLOCK

ENDS = 2
"""Blocks of a row that are chosen whatever their scores: its own and block 0."""


def block_means(x: Float[Tensor, "P D"]) -> Float[Tensor, "blocks D"]:
    """Mean of each 64 rows from position 0; missing rows of the last block count as zeros."""
    padded = torch.nn.functional.pad(x.float(), (0, 0, 0, -x.shape[0] % BLOCK))
    return padded.unflatten(0, (-1, BLOCK)).mean(dim=1)


def best_blocks(
    q: Float[Tensor, "P D"], k: Float[Tensor, "P D"], topk: int, *, keep_ends: bool
) -> list[Int[Tensor, " n"]]:
    """For each 64-row block of one head's whole prompt, its `topk` causal key blocks, ascending.

    With `keep_ends` the row's own block and block 0 are always among them, so that there are at
    least two where there can be. Ties go to the smaller block.
    """
    scores = block_means(q) @ block_means(k).T
    topk = max(topk, ENDS) if keep_ends else topk
    chosen = []
    for row, row_scores in enumerate(scores):
        causal = row_scores[: row + 1].clone()
        if keep_ends:
            causal[[0, row]] = torch.inf
        order = causal.sort(descending=True, stable=True).indices
        chosen.append(order[:topk].sort().values)
    return chosen
