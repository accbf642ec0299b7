"""Needle maps: which question falls into which cell, and what is drawn of it."""

import math
from typing import Any

import numpy as np
import pytest

from minference.viz.needle import needle_figure, needle_grids, needle_methods


def question(method: str, length: int, depth: float | None, correct: int, seed: int = 0) -> Any:
    place = {"task": "niah", "length": length, "placement": "end", "split": "heldout"}
    answer = {"seed": seed, "questions": 1, "index": 0, "depth": depth, "correct": correct}
    return {"record": "question", **place, "method": method, **answer}


RECORDS = [
    question("dense", 2048, 0.02, 1, 0),
    question("dense", 2048, 0.02, 1, 1),
    question("dense", 4096, 0.99, 1, 2),
    question("dense", 4096, 0.40, 0, 3),
    question("a", 2048, 0.02, 1, 0),
    question("a", 2048, 0.02, 0, 1),
    question("a", 4096, 0.40, 1, 3),
    {"record": "prefill", "task": "niah", "method": "a"},
    question("a", 4096, None, 1, 4),
]


def test_a_needle_counts_for_the_nearest_depth() -> None:
    dense, sparse, difference = needle_grids(RECORDS, "a", rows=3)
    nan = math.nan
    np.testing.assert_array_equal(dense.mean, [[1, nan], [nan, 0], [nan, 1]])
    np.testing.assert_array_equal(sparse.mean, [[0.5, nan], [nan, 1], [nan, nan]])
    np.testing.assert_array_equal(difference.mean, [[-0.5, nan], [nan, 1], [nan, nan]])
    np.testing.assert_array_equal(difference.count, [[2, 0], [0, 1], [0, 0]])
    assert (dense.lengths, dense.depths) == ((2048, 4096), (0.0, 0.5, 1.0))


def test_a_map_has_as_many_rows_as_needles_had_depths() -> None:
    assert len(needle_grids(RECORDS, "a")[0].depths) == 5
    for noted, rows in (([0, 11], 11), ([3], 3), ([1], 2)):
        runs = [{"record": "run", "model": "m", "depths": depths} for depths in noted]
        assert len(needle_grids([*runs, *RECORDS], "a")[0].depths) == rows


def test_the_difference_is_on_common_questions_alone() -> None:
    lines = [question("dense", 512, 0.0, 0, 0), question("dense", 512, 0.0, 1, 1)]
    _, sparse, difference = needle_grids([*lines, question("a", 512, 0.0, 1, 1)], "a", rows=2)
    assert sparse.mean[0, 0] == 1
    assert difference.mean[0, 0] == 0


def test_a_method_without_needles_lists_those_with() -> None:
    assert needle_methods(RECORDS) == ["dense", "a"]
    with pytest.raises(ValueError, match="methods a, dense"):
        needle_grids(RECORDS, "b")
    with pytest.raises(ValueError, match="none of any method"):
        needle_grids(RECORDS, "a", task="single")


def test_the_figure_draws_the_grids() -> None:
    pytest.importorskip("matplotlib")
    dense, sparse, difference = needle_grids(RECORDS, "a", rows=3)
    figure = needle_figure({"dense": dense, "a": sparse}, difference, title="t")
    images = [axis.images[0] for axis in figure.axes[:3]]
    for image, grid in zip(images, (dense, sparse, difference), strict=True):
        drawn = image.get_array()
        assert drawn is not None
        np.testing.assert_array_equal(np.ma.getmaskarray(drawn), np.isnan(grid.mean))
        np.testing.assert_array_equal(np.ma.compressed(drawn), grid.mean[~np.isnan(grid.mean)])
    assert [image.get_clim() for image in images] == [(0, 1), (0, 1), (-1, 1)]
    assert [axis.get_title() for axis in figure.axes[:3]] == ["dense", "a", "difference"]


def test_a_map_without_questions_is_left_out() -> None:
    pytest.importorskip("matplotlib")
    base, own, difference = needle_grids(RECORDS, "dense", baseline="none", rows=3)
    figure = needle_figure({"none": base, "dense": own}, difference, title="t")
    assert [axis.get_title() for axis in figure.axes[:1]] == ["dense"]
    assert len(figure.axes) == 2  # the map and its scale
