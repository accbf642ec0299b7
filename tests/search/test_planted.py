"""Search finds the kind that was planted, and grows budgets until the target is reached."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from minference.patterns import BUDGET_LENGTH, AShape, BlockSparse, Dense, VerticalSlash
from minference.search.cost import CostModel
from minference.search.grow import grow_to_recall
from minference.search.planted import PLANTS
from minference.search.score import Call, LayerScorer, score_layer
from minference.testing import context_for, layout_of, random_qkv

LENGTH, HEADS = 2048, 6
CANDIDATES = tuple(
    pattern.scaled(BUDGET_LENGTH / LENGTH)
    for pattern in (AShape(64, 448), VerticalSlash(128, 96), BlockSparse(8))
)
"""Each computes 512 keys a row."""


def call_of(q: Tensor, k: Tensor, v: Tensor) -> Call:
    return Call(q, k, v, context_for(layout_of(q, k), q.shape[1], dim=q.shape[-1]))


@pytest.mark.parametrize("seed", [7, 8, 9])
@pytest.mark.parametrize("noise", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("planted", PLANTS)
def test_the_planted_kind_wins(planted: str, noise: float, seed: int) -> None:
    call = call_of(*PLANTS[planted](HEADS, LENGTH, LENGTH // 4, noise, seed))
    for scores in score_layer(call, CANDIDATES, rows=48).values():
        best = scores.argmax(dim=0)
        assert [CANDIDATES[c].kind for c in best.tolist()] == [planted] * HEADS


def test_scores_of_everything_are_one() -> None:
    call = call_of(*random_qkv(4, 2, 600))
    scores = LayerScorer(call, 32).scores([Dense()] * 4)
    torch.testing.assert_close(scores["mass"], torch.ones(4))
    torch.testing.assert_close(scores["output"], torch.ones(4), atol=1e-5, rtol=0)


def test_values_wider_than_keys_are_scored_whole() -> None:
    q, k, v = random_qkv(4, 2, 600)
    call = call_of(q, k, torch.cat([v, 100 * v.flip(2)], dim=-1))
    own = [AShape(64, 64)] * 4
    whole, first = (
        LayerScorer(x, 32).scores(own) for x in (call, replace(call, v=call.v[..., :32]))
    )
    torch.testing.assert_close(whole["mass"], first["mass"])
    assert not torch.allclose(whole["output"], first["output"], rtol=0.01)
    assert LayerScorer(call, 32).scores([Dense()] * 4)["output"] == pytest.approx(torch.ones(4))


def test_sinks_take_their_part_of_the_mass() -> None:
    call = call_of(*random_qkv(4, 2, 600))
    sinks = torch.tensor([-30.0, 2.0, 6.0, 9.0])
    with_sinks = replace(call, context=replace(call.context, sinks=sinks))
    plain, lost = (
        1 - LayerScorer(x, 32).scores([AShape(64, 64)] * 4)["mass"] for x in (call, with_sinks)
    )
    torch.testing.assert_close(lost[0], plain[0])
    assert bool((lost[1:] < plain[1:]).all())
    assert lost[3] < 0.2 * plain[3]
    for scores in LayerScorer(with_sinks, 32).scores([Dense()] * 4).values():
        torch.testing.assert_close(scores, torch.ones(4), atol=1e-5, rtol=0)


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
