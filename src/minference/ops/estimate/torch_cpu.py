"""The last-query estimate in vectorised torch, a KV head at a time."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minference.ops.estimate.reference import ROWS, LineScores
from minference.ops.scores import softcapped


def _weights(
    q: Float[Tensor, "G R D"], k: Float[Tensor, "P D"], scale: float, softcap: float
) -> Float[Tensor, "G R P"]:
    scores = softcapped((q.flatten(0, 1).float() * scale) @ k.float().T, softcap)
    scores = scores.view(*q.shape[:2], -1)
    corner = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).triu(1)
    scores[..., -q.shape[1] :].masked_fill_(corner, -torch.inf)
    return scores.softmax(dim=-1)


def _diagonal_sums(weights: Float[Tensor, "G R P"]) -> Float[Tensor, "G P"]:
    """Sum at each distance: shear the rows by writing them askew, so that every diagonal becomes a
    column."""
    heads, rows, keys = weights.shape
    width = keys + rows - 1
    padded = weights.new_zeros(heads, rows * width)
    # row r lies rows - 1 - r places further right than its own line begins
    skewed = (heads, rows, keys), (rows * width, width - 1, 1), rows - 1
    padded.as_strided(*skewed).copy_(weights)
    return padded.view(heads, rows, width).sum(dim=1)[:, :keys].flip(-1)


def last_query_lines(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    first: Int[Tensor, " B"],
    stop: Int[Tensor, " B"],
    *,
    scale: float,
    softcap: float = 0.0,
    rows: int = ROWS,
) -> LineScores:
    """Column and distance sums of the last `rows` real queries; see the reference."""
    batch, heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1:3]
    group, shift = heads // kv_heads, kv_len - q_len
    columns = torch.full((batch, heads, kv_len), -1.0, device=q.device)
    slashes = torch.full_like(columns, -1.0)
    for b in range(batch):
        begin, end = int(first[b]), int(stop[b])
        low = max(end - rows, shift, begin)
        if low >= end:
            continue
        for kv_head in range(kv_heads):
            own = slice(kv_head * group, (kv_head + 1) * group)
            queries, keys = q[b, own, low - shift : end - shift], k[b, kv_head, begin:end]
            weights = _weights(queries, keys, scale, softcap)
            columns[b, own, : end - begin] = weights.sum(dim=1)
            slashes[b, own, : end - begin] = _diagonal_sums(weights)
    return LineScores(columns, slashes)
