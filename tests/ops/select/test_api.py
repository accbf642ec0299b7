"""Selection against sorting in Python; forced places, ties, budgets."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minference.index import pack_bits
from minference.ops.select.api import select_columns, select_offsets
from minference.ops.select.lists import (
    columns_from_positions,
    lines_to_offsets,
    local_offsets,
    offset_budget,
    offset_slots,
    select_distances,
)


def best(scores: list[float], budget: int, forced: int) -> list[int]:
    ranked = [math.inf if i < forced else s for i, s in enumerate(scores)]
    order = sorted(range(len(scores)), key=lambda i: (-ranked[i], i))
    real = [i for i in order if scores[i] >= 0]
    return sorted(real[: max(budget, forced)])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), length=st.integers(1, 400))
def test_columns_are_the_best_with_ties_to_the_first(seed: int, length: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-1, 6, (2, 3, length), generator=generator).float()
    budgets = (0, 7, length + 5)
    lists = select_columns(scores, budgets, sink=4)
    for b in range(2):
        for h, budget in enumerate(budgets):
            assert lists.row(b, h).tolist() == best(scores[b, h].tolist(), budget, 4)


def test_a_score_that_is_no_number_is_kept() -> None:
    scores = torch.tensor([[[0.5, math.nan, 3.0, -1.0, 1.0, -1.0]]])
    assert select_columns(scores, (3,), sink=1).row(0, 0).tolist() == [0, 1, 2]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), length=st.integers(1, 2000))
def test_offsets_keep_the_local_band_and_match_their_bitmap(seed: int, length: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    masses = torch.rand((1, 2, offset_slots(length)), generator=generator)
    lists, bits = select_offsets(masses, (1, 9), local=100)
    for h, budget in enumerate((1, 9)):
        row = lists.row(0, h)
        expected = best(masses[0, h].tolist(), budget, min(local_offsets(100), masses.shape[2]))
        assert (row + 1).tolist() == expected
        flags = torch.zeros(masses.shape[2], dtype=torch.bool)
        flags[(row + 1).long()] = True
        assert torch.equal(bits[0, h, 0], pack_bits(flags))


@pytest.mark.parametrize("distance", [0, 1, 63, 64, 65, 127, 128, 200])
def test_a_distance_passes_through_these_offsets(distance: int) -> None:
    lists, _ = lines_to_offsets(torch.tensor([[[distance]]]), 1000)
    touched = {o for o in range(-1, 16) if 64 * o - 64 < distance <= 64 * o + 127}
    assert set(lists.row(0, 0).tolist()) == touched | {-1, 0}


def test_budget_of_clustered_slashes_covers_them() -> None:
    distances = torch.cat([torch.arange(2048), torch.arange(5000, 5253)])[None, None]
    lists, _ = lines_to_offsets(distances, 8192)
    assert int(lists.count) <= offset_budget(distances.shape[-1])


def test_lines_mode_covers_every_chosen_distance() -> None:
    scores = torch.rand(1, 1, 1000)
    lists, _ = select_distances(scores, (20,), 10)
    kept = set(best(scores[0, 0].tolist(), 20, 10))
    offsets = set(lists.row(0, 0).tolist())
    for s in kept:
        assert {o for o in range(-1, 18) if 64 * o - 64 < s <= 64 * o + 127} <= offsets


def test_positions_are_sorted_and_unique() -> None:
    lists = columns_from_positions(torch.tensor([[[7, 3, 7, -1, 900, 3]]]), 100)
    assert lists.row(0, 0).tolist() == [3, 7]


@pytest.mark.parametrize(
    ("budgets", "message"),
    [((1,), "each of the 2 heads"), ((1, -2), "at least 0, got -2"), ((1, 2.5), "got 2.5")],
)
def test_bad_budgets_are_named(budgets: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_columns(torch.rand(1, 2, 50), budgets)
