"""Queries, keys and values of heads whose kind is known, to test a search with."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minference.testing import Lines, planted_qkv, random_lines, random_qkv

DIM = 64
Qkv = tuple[Tensor, Tensor, Tensor]


def local_heads(heads: int, length: int, reach: int, noise: float, seed: int) -> Qkv:
    """Heads whose weight falls off smoothly with the distance, over some `reach` keys, and which
    also look at the first four: an A-shape's."""
    generator, place = torch.Generator().manual_seed(seed), torch.arange(length)
    q, k, v = random_qkv(heads, heads, length, dim=DIM, seed=seed)
    q, k = q * math.sqrt(noise), k * math.sqrt(noise)
    wide = 1.75 + 0.2 * torch.rand(heads, generator=generator)
    for h in range(heads):
        rates = torch.linspace(0.2, 1.0, 16) * math.pi / (reach * float(wide[h]))
        turns = torch.cat([(place[:, None] * rates).cos(), (place[:, None] * rates).sin()], dim=1)
        q[0, h, :, :32] += turns * 2.5
        k[0, h, :, :32] += turns * 2.5
    q[..., 32], k[..., :4, 32] = 8.0, 11.0
    return q, k, v


def line_heads(heads: int, length: int, reach: int, noise: float, seed: int) -> Qkv:
    """Heads of scattered columns and two far diagonals: vertical-slash."""
    generator, lines = torch.Generator().manual_seed(seed), []
    for h in range(heads):
        columns = int(torch.randint(reach // 12, reach // 8, (1,), generator=generator))
        own = random_lines(length, columns=columns, clusters=0, width=1, band=1, seed=seed + h)
        far = torch.randint(length // 4, length // 2, (2,), generator=generator)
        lines.append(Lines(own.columns, torch.cat([torch.zeros(1, dtype=torch.long), far])))
    return planted_qkv(lines, length, kv_heads=heads, noise=noise, strength=7.0, seed=seed)


def block_heads(heads: int, length: int, reach: int, noise: float, seed: int) -> Qkv:
    """Heads whose blocks of 64 queries each look at two blocks of their own: block-sparse."""
    generator = torch.Generator().manual_seed(seed)
    blocks = length // 64
    q, k, v = random_qkv(heads, heads, length, dim=DIM, seed=seed)
    names = torch.nn.functional.normalize(
        torch.randn(heads, blocks, DIM, generator=generator), dim=-1
    )
    gain = math.sqrt(10 * math.sqrt(DIM))
    k = k * math.sqrt(noise) + gain * names.repeat_interleave(64, dim=1)
    asked = torch.zeros(heads, blocks, DIM)
    for _ in range(2):
        chosen = (
            torch.rand(heads, blocks, generator=generator) * torch.arange(1, blocks + 1)
        ).long()
        asked += names.gather(1, chosen[..., None].expand(-1, -1, DIM))
    q = q * math.sqrt(noise) + gain * asked.repeat_interleave(64, dim=1)
    return q, k, v


def even_heads(heads: int, length: int, reach: int, noise: float, seed: int) -> Qkv:
    """Heads that look everywhere alike: none of the three."""
    q, k, v = random_qkv(heads, heads, length, dim=DIM, seed=seed)
    return q * math.sqrt(noise), k * math.sqrt(noise), v


PLANTS: dict[str, Callable[[int, int, int, float, int], Qkv]] = {
    "a_shape": local_heads,
    "vertical_slash": line_heads,
    "block_sparse": block_heads,
}
"""By the kind of pattern that serves them best."""
