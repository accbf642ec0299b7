"""Candidates and their cost."""

import pytest

from minference.patterns import BUDGET_LENGTH, AShape, BlockSparse, Dense, TriShape, VerticalSlash
from minference.search.cost import FAR, UNION, CostModel, Timings, Work, prompt_work, tile_work
from minference.search.space import SPACES, TARGET, equalised, grown, space

TIMED = Timings(
    device="a device",
    heads=8,
    launch=1e-5,
    tile=1e-6,
    block=1e-7,
    listed=2e-7,
    column=3e-7,
    index={"a_shape": (1e-5, 0.0), "vertical_slash": (1e-4, 1e-9)},
    dense=0.5e-7,
    residual=0.03,
    worst=0.1,
    measured=26,
)


def test_work_is_what_the_kernels_compute() -> None:
    assert tile_work(AShape(100, 800), 10_000) == Work(1, 15, 2)
    assert tile_work(VerticalSlash(500, 700), 10_000) == Work(1, 25, 0, 500 / 64)
    assert tile_work(VerticalSlash(0, 1), 10_000) == Work(1, 4, 0, 30 / 64)
    assert tile_work(BlockSparse(10), 10_000) == Work(1, 0, 10 * UNION)
    assert tile_work(BlockSparse(10, 128), 10_000) == Work(1, 0, 20)
    assert tile_work(BlockSparse(10), 100) == Work(1, 0, 2)
    assert prompt_work(Dense(), 512) == Work(4, 2 + 4 + 6 + 8)
    assert prompt_work(AShape(0, 65), 512) == Work(4, 2 + 3 + 3 + 3)
    with pytest.raises(TypeError, match="TriShape is not modelled"):
        tile_work(TriShape(), 100)


def test_far_slashes_leave_the_first_tiles_out() -> None:
    near, far = AShape(0, 1024), VerticalSlash(0, 480)
    assert tile_work(near, BUDGET_LENGTH).blocks == tile_work(far, BUDGET_LENGTH).blocks
    share = prompt_work(far, BUDGET_LENGTH).blocks / prompt_work(near, BUDGET_LENGTH).blocks
    assert 1 - FAR < share < 1 - FAR + 0.01
    every = prompt_work(VerticalSlash(0, BUDGET_LENGTH), BUDGET_LENGTH)
    assert every.blocks == prompt_work(Dense(), BUDGET_LENGTH).blocks, "every offset, every block"


def test_density_is_the_share_of_the_causal_area() -> None:
    model = CostModel()
    assert model.density(Dense(), 512) == pytest.approx(1, abs=2e-3)
    # the diagonal's block alone, half of it causal, and the block before it
    assert model.density(BlockSparse(2), 6400) == pytest.approx(0.03, abs=2e-3)
    assert model.mean_density([[Dense(), BlockSparse(2)]], 6400) == pytest.approx(0.515, abs=2e-3)
    assert model.speedup([[BlockSparse(2)]], 6400) == pytest.approx(33, rel=0.1)


def test_timings_weigh_what_is_computed() -> None:
    model = CostModel(TIMED)
    assert (model.listed, model.column) == (pytest.approx(2.0), pytest.approx(3.0))
    shape = prompt_work(AShape(100, 800), 10_112)
    assert shape.tiles == 79
    expected = 64 * (shape.blocks + 2 * shape.listed) / 79
    assert model.row_cost(AShape(100, 800), 10_112) == pytest.approx(expected)
    lines = prompt_work(VerticalSlash(500, 700), 10_112)
    expected = 64 * (lines.blocks + 3 * lines.columns) / 79
    assert model.row_cost(VerticalSlash(500, 700), 10_112) == pytest.approx(expected)
    work = prompt_work(AShape(64, 64), 1024)
    kernel = 1e-5 + 8 * 1e-6 + 1e-7 * work.blocks + 2e-7 * work.listed
    assert TIMED.kernel_seconds([work]) == pytest.approx(kernel)
    assert TIMED.layer_seconds([AShape(64, 64)], 1024) == pytest.approx(kernel + 1e-5)
    two = TIMED.layer_seconds([AShape(64, 64), VerticalSlash(64, 64)], 1024)
    assert two > kernel + 1e-5 + 1e-4 + 1024e-9
    rows = [[AShape(64, 64)] * 8] * 3
    dense = TIMED.dense_seconds(8, 65_536)
    assert model.speedup(rows, 65_536) == pytest.approx(
        dense / TIMED.layer_seconds(rows[0], 65_536)
    )
    assert Timings.from_dict(TIMED.to_dict()) == TIMED
    assert "a column 3.00" in model.describe()


@pytest.mark.parametrize("timings", [None, TIMED], ids=["counted", "timed"])
@pytest.mark.parametrize("length", [16_384, 32_768, BUDGET_LENGTH])
@pytest.mark.parametrize("name", SPACES)
def test_candidates_cost_the_same_at_the_length_searched(
    name: str, length: int, timings: Timings | None
) -> None:
    model = CostModel(timings)
    target = model.row_cost(TARGET, BUDGET_LENGTH)
    for candidate in equalised(space(name), target, model, length):
        cost = model.row_cost(candidate.served(length), length)
        if isinstance(candidate, AShape) and candidate.sink > 256 and length < BUDGET_LENGTH:
            continue  # the paper's sinks alone cost more than a short prompt's share
        assert abs(cost - target * length / BUDGET_LENGTH) <= 96 * model.listed, candidate


def test_of_budgets_that_cost_the_same_the_largest_is_taken() -> None:
    (found,) = equalised([AShape(64, 4096)], 8192.0, CostModel(), 8192)
    assert tile_work(found.served(8192), 8192) == Work(1, 7, 1)
    assert found == AShape(64, 5100)
    for short in equalised(SPACES["wide"], 5248.0, CostModel(), 600):
        assert CostModel().row_cost(short, BUDGET_LENGTH) <= 5248, "a short prompt's whole blocks"


def test_growth_raises_every_budget() -> None:
    assert grown(VerticalSlash(100, 200), 1.5) == VerticalSlash(150, 300)
    assert grown(AShape(10, 200), 1.5) == AShape(10, 300)
    assert grown(BlockSparse(1), 1.5) == BlockSparse(2)


def test_an_unknown_space_lists_the_known() -> None:
    with pytest.raises(ValueError, match="paper"):
        space("papr")
