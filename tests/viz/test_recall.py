"""Recall against density: which points the records give, and what is drawn of them."""

import numpy as np
import pytest

from minference.viz.recall import RecallPoint, recall_figure, recall_points

RECORDS = [
    {"record": "prefill", "method": "a", "density": [0.5, 1.0], "recall": [0.75, 1.0]},
    {"record": "prefill", "method": "a", "density": [0.25, 1.0], "recall": [0.25, 1.0]},
    {"record": "prefill", "method": "b", "density": [0.5], "recall": [0.75]},
    {"record": "prefill", "method": "b", "density": [0.5]},
    {"record": "question", "method": "a"},
]


def test_points_are_means_over_prefills_by_layer() -> None:
    assert recall_points(RECORDS) == [
        RecallPoint("a", 0, None, 0.375, 0.5),
        RecallPoint("a", 1, None, 1.0, 1.0),
        RecallPoint("b", 0, None, 0.5, 0.75),
    ]


def test_the_figure_draws_the_points_and_their_means() -> None:
    pytest.importorskip("matplotlib")
    left, right = recall_figure(recall_points(RECORDS), title="t").axes
    drawn = [np.asarray(found.get_offsets()).tolist() for found in left.collections]
    assert drawn == [
        [[0.375, 0.5], [1.0, 1.0]],
        [[0.6875, 0.75]],
        [[0.5, 0.75]],
        [[0.5, 0.75]],
    ]
    lines = [np.asarray(line.get_xydata()).tolist() for line in right.lines]
    assert lines == [[[0.0, 0.5], [1.0, 1.0]], [[0.0, 0.75]]]


def test_no_point_is_an_error() -> None:
    with pytest.raises(ValueError, match="no recall"):
        recall_figure([], title="t")
