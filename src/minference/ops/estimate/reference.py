"""Where the last queries of a prompt look: attention mass by column, distance and block offset.

The estimate of MInference (arXiv 2407.02490, section 3): exact softmax scores of the last 64
queries against every key, summed down the columns and along the diagonals.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minference.index import BLOCK, TILE
from minference.ops.scores import softcapped
from minference.ops.select.lists import offset_slots

ROWS = 64


class LineScores(NamedTuple):
    """Mass of the last queries on each column position and at each distance; -1 where none is."""

    columns: Float[Tensor, "B H N"]
    slashes: Float[Tensor, "B H N"]


class MassScores(NamedTuple):
    """Mass of the last queries on each column position and on each block offset (slot x is
    offset x - 1)."""

    columns: Float[Tensor, "B H N"]
    offsets: Float[Tensor, "B H n"]


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
    """Column and distance sums of the last `rows` real queries, one head at a time."""
    batch, heads, q_len, _ = q.shape
    kv_len, group = k.shape[2], heads // k.shape[1]
    columns = torch.full((batch, heads, kv_len), -1.0, device=q.device)
    slashes = columns.clone()
    for b in range(batch):
        begin, end = int(first[b]), int(stop[b])
        shift = kv_len - q_len
        queries = range(max(end - rows, shift, begin), end)
        for h in range(heads):
            keys = k[b, h // group, begin:end].float()
            row_sums = torch.zeros(end - begin, device=q.device)
            distance_sums = torch.zeros(end - begin, device=q.device)
            for i in queries:
                position = i - begin
                scores = softcapped(
                    keys[: position + 1] @ q[b, h, i - shift].float() * scale, softcap
                )
                weights = scores.softmax(dim=0)
                row_sums[: position + 1] += weights
                distance_sums[: position + 1] += weights.flip(0)
            columns[b, h, : end - begin] = row_sums
            slashes[b, h, : end - begin] = distance_sums
    return LineScores(columns, slashes)


def offset_shares(device: torch.device | str) -> Float[Tensor, "3 block"]:
    """Share of a distance's (query, key) pairs that lies in each of the three offsets it can touch.

    Of the distance `64 m + r`, row x = 0, 1, 2 gives the share of offset `m - 1 + x`: a tile's 128
    rows each meet the distance in one key, and the offset's block holds a run of those rows.
    """
    r = torch.arange(BLOCK, device=device)
    shares = []
    for x in range(3):
        t = r + BLOCK * (1 - x)
        held = torch.clamp(t + BLOCK - 1, max=TILE - 1) - torch.clamp(t, min=0) + 1
        shares.append(held.clamp(min=0).float() / TILE)
    return torch.stack(shares)


def distances_to_offsets(slashes: Float[Tensor, "B H N"]) -> Float[Tensor, "B H n"]:
    """Mass of each block offset from the mass at each distance; the total is kept."""
    kv_len = slashes.shape[-1]
    padded = torch.nn.functional.pad(slashes.clamp(min=0), (0, -kv_len % BLOCK))
    parts = padded.unflatten(-1, (-1, BLOCK)) @ offset_shares(slashes.device).T
    masses = slashes.new_zeros((*slashes.shape[:-1], offset_slots(kv_len)))
    for x in range(3):
        masses[..., x : x + parts.shape[-2]] += parts[..., x]
    return masses
