"""Candidates and their cost."""

import pytest

from minference.patterns import AShape, BlockSparse, Dense, TriShape, VerticalSlash
from minference.search.cost import CostModel
from minference.search.space import SPACES, TARGET, equalised, grown, space


def test_cost_counts_computed_keys() -> None:
    model = CostModel(column=2.0)
    assert model.row_cost(AShape(100, 800), 10_000) == 64 * (2 + 13)
    assert model.row_cost(VerticalSlash(500, 700), 10_000) == 64 * (22 + 3) + 1000
    assert model.row_cost(BlockSparse(10), 10_000) == 640
    assert model.row_cost(BlockSparse(10), 100) == 100
    assert model.density(Dense(), 500) == 1
    assert model.density(BlockSparse(10), 1280) == pytest.approx(0.75)
    with pytest.raises(TypeError, match="TriShape is not modelled"):
        model.row_cost(TriShape(), 100)


@pytest.mark.parametrize("name", SPACES)
def test_candidates_of_a_space_cost_the_same(name: str) -> None:
    model = CostModel()
    target = model.row_cost(TARGET, 131_072)
    for candidate in equalised(space(name), target, model):
        assert abs(model.row_cost(candidate, 131_072) - target) <= 64


def test_growth_raises_every_budget() -> None:
    assert grown(VerticalSlash(100, 200), 1.5) == VerticalSlash(150, 300)
    assert grown(AShape(10, 200), 1.5) == AShape(10, 300)
    assert grown(BlockSparse(1), 1.5) == BlockSparse(2)


def test_an_unknown_space_lists_the_known() -> None:
    with pytest.raises(ValueError, match="paper"):
        space("papr")
