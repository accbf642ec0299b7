"""Search finds the kind that was planted, and grows budgets until the target is reached."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minference.patterns import AShape, BlockSparse, Dense, VerticalSlash
from minference.search.cost import CostModel
from minference.search.grow import grow_to_recall
from minference.search.score import Call, LayerScorer, score_layer
from minference.search.space import BASIS
from minference.testing import (
    Lines,
    context_for,
    layout_of,
    planted_qkv,
    random_lines,
    random_qkv,
)

Plant = Callable[[float, int], tuple[Tensor, Tensor, Tensor]]
LENGTH, HEADS = 2048, 6
CANDIDATES = tuple(
    pattern.scaled(BASIS / LENGTH)
    for pattern in (AShape(64, 448), VerticalSlash(128, 96), BlockSparse(8))
)
"""Each computes 512 keys a row."""


def call_of(q: Tensor, k: Tensor, v: Tensor) -> Call:
    return Call(q, k, v, context_for(layout_of(q, k), q.shape[1], dim=q.shape[-1]))


def local_heads(noise: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Heads whose weight falls off smoothly with the distance, over some 500 keys, and which also
    look at the first four."""
    dim, place = 64, torch.arange(LENGTH)
    q, k, v = random_qkv(HEADS, HEADS, LENGTH, dim=dim, seed=seed)
    q, k = q * math.sqrt(noise), k * math.sqrt(noise)
    for h in range(HEADS):
        rates = torch.linspace(0.2, 1.0, 16) * math.pi / (900 + 20 * h)
        turns = torch.cat([(place[:, None] * rates).cos(), (place[:, None] * rates).sin()], dim=1)
        q[0, h, :, :32] += turns * 2.5
        k[0, h, :, :32] += turns * 2.5
    q[..., 32], k[..., :4, 32] = 8.0, 11.0
    return q, k, v


def line_heads(noise: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Heads of scattered columns and a few far diagonals."""
    lines = []
    for h in range(HEADS):
        own = random_lines(LENGTH, columns=50 + h, clusters=0, width=1, band=1, seed=seed + h)
        lines.append(Lines(own.columns, torch.tensor([0, 600 + 10 * h, 900 + 7 * h])))
    return planted_qkv(lines, LENGTH, kv_heads=HEADS, noise=noise, strength=7.0, seed=seed)


def block_heads(noise: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Heads whose blocks of 64 queries each look at a few blocks of their own."""
    generator = torch.Generator().manual_seed(seed)
    blocks, dim = LENGTH // 64, 64
    q, k, v = random_qkv(HEADS, HEADS, LENGTH, dim=dim, seed=seed)
    names = torch.nn.functional.normalize(
        torch.randn(HEADS, blocks, dim, generator=generator), dim=-1
    )
    gain = math.sqrt(10 * math.sqrt(dim))
    k = k * math.sqrt(noise) + gain * names.repeat_interleave(64, dim=1)
    asked = torch.zeros(HEADS, blocks, dim)
    for _ in range(2):
        chosen = (
            torch.rand(HEADS, blocks, generator=generator) * torch.arange(1, blocks + 1)
        ).long()
        asked += names.gather(1, chosen[..., None].expand(-1, -1, dim))
    q = q * math.sqrt(noise) + gain * asked.repeat_interleave(64, dim=1)
    return q, k, v


@pytest.mark.parametrize("seed", [7, 8, 9])
@pytest.mark.parametrize("noise", [0.1, 0.3, 0.6])
@pytest.mark.parametrize(
    ("planted", "kind"),
    [(local_heads, AShape), (line_heads, VerticalSlash), (block_heads, BlockSparse)],
)
def test_the_planted_kind_wins(planted: Plant, kind: type, noise: float, seed: int) -> None:
    call = call_of(*planted(noise, seed))
    for scores in score_layer(call, CANDIDATES, rows=48).values():
        best = scores.argmax(dim=0)
        assert [type(CANDIDATES[c]) for c in best.tolist()] == [kind] * HEADS


def test_scores_of_everything_are_one() -> None:
    call = call_of(*random_qkv(4, 2, 600))
    scores = LayerScorer(call, 32).scores([Dense()] * 4)
    torch.testing.assert_close(scores["mass"], torch.ones(4))
    torch.testing.assert_close(scores["output"], torch.ones(4), atol=1e-5, rtol=0)


def test_budgets_grow_to_the_target_or_to_dense() -> None:
    call = call_of(*random_qkv(4, 2, 1024))
    start = [VerticalSlash(100, 200), AShape(64, 2000), BlockSparse(40), VerticalSlash(3000, 100)]
    own, mass = grow_to_recall(call, start, 0.6, CostModel(), rows=32)
    again = LayerScorer(call, 32).scores(own)["mass"]
    assert min(mass) >= 0.6
    assert bool((again >= 0.6).all())
    full, mass = grow_to_recall(call, start, 1.0, CostModel(), rows=32)
    assert full == [Dense()] * 4
    assert mass == [1.0] * 4
    with pytest.raises(ValueError, match=r"got 1\.5"):
        grow_to_recall(call, start, 1.5, CostModel(), rows=32)
