"""Accuracy against speed: which methods become points, and where they are drawn."""

from itertools import pairwise

import numpy as np
import pytest

from minference.bench.peers import MethodTime, Times
from minference.viz.accuracy_speed import Panel, accuracy_figure, accuracy_panel

LONG = "minference:budget_length=none,selection=lines,vertical=512,slash=2048"


def answers(method: str, right: list[int], length: int = 32_768) -> list[dict[str, object]]:
    base = {"record": "question", "task": "t", "length": length, "placement": "spread"}
    base |= {"split": "heldout", "questions": 1, "index": 0}
    return [base | {"method": method, "seed": n, "correct": c} for n, c in enumerate(right)]


RECORDS = [
    *answers("dense", [1, 1, 1, 1]),
    *answers("a", [1, 1, 0, 0]),
    *answers(LONG, [1, 1, 1, 0]),
    *answers("untimed", [1, 1, 1, 1]),
    *answers("dense", [1], 8192),
    *answers("elsewhere", [1], 8192),
]
TIMES: Times = {
    (length, method): MethodTime(1.0, speedup, "fa3", 0.25, "H200")
    for length, method, speedup in (
        (32_768, "a", 4.0),
        (32_768, LONG, 0.5),
        (32_768, "elsewhere", 9.0),
        (131_072, "a", 8.0),
    )
}


def test_points_have_answers_beside_dense_and_a_time_the_best_first() -> None:
    found = accuracy_panel(RECORDS, TIMES, 32_768, 32_768)
    assert [(p.method, p.gap.mean, p.time.speedup) for p in found.points] == [
        (LONG, -0.25, 0.5),
        ("a", -0.5, 4.0),
    ]
    later = accuracy_panel(RECORDS, TIMES, 32_768, 131_072)
    assert [(p.method, p.gap.mean, p.time.speedup) for p in later.points] == [("a", -0.5, 8.0)]
    assert accuracy_panel(RECORDS, TIMES, 32_768, 32_768, placement="end").points == []


def test_only_tasks_that_every_method_was_asked_count() -> None:
    more = [record | {"task": "u"} for record in answers("dense", [1, 1]) + answers("a", [0, 0])]
    found = accuracy_panel([*RECORDS, *more], TIMES, 32_768, 32_768)
    assert (found.tasks, found.others) == (("t",), ("u",))
    assert [point.gap.mean for point in found.points] == [-0.25, -0.5]
    pytest.importorskip("matplotlib")
    figure = accuracy_figure([found], title="picture")
    assert figure.get_suptitle() == "picture"
    (axes,) = figure.axes
    assert axes.get_title().endswith("\nt alone")
    later = accuracy_panel([*RECORDS, *more], TIMES, 32_768, 131_072)
    assert (later.tasks, [point.gap.mean for point in later.points]) == (("t", "u"), [-4 / 6])


def test_the_figure_draws_each_method_at_its_speed_and_loss() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.collections import PathCollection

    panels = [accuracy_panel(RECORDS, TIMES, 32_768, n) for n in (32_768, 131_072)]
    figure = accuracy_figure(panels, title="t")
    left, right = figure.axes
    for axes, expected in ((left, [[1, 0], [0.5, 0.25], [4, 0.5]]), (right, [[1, 0], [8, 0.5]])):
        dots = [found for found in axes.collections if isinstance(found, PathCollection)]
        assert [np.asarray(found.get_offsets()).tolist() for found in dots] == [
            [place] for place in expected
        ]
    assert figure.get_suptitle() == "t"
    assert left.yaxis_inverted()
    assert right.get_title() == "answers at 32K, time at 128K tokens"
    assert left.get_xlabel().endswith("times as fast as FlashAttention 3")
    labels = [text.get_text() for text in left.texts]
    assert labels[:2] == [
        "minference:budget_length=none,\nselection=lines,vertical=512,\nslash=2048  (25%)",
        "a  (25%)",
    ]


def test_labels_do_not_touch() -> None:
    pytest.importorskip("matplotlib")
    records = [*answers("dense", [1, 1])]
    times: Times = {}
    for n in range(12):
        records += answers(f"m{n}", [1, 0])
        times[32_768, f"m{n}"] = MethodTime(1.0, 1.0 + n, "fa3", 0.5, None)
    found = accuracy_panel(records, times, 32_768, 32_768)
    (panel,) = accuracy_figure([found], title="t").axes
    heights = [text.get_position()[1] for text in panel.texts[:12]]
    assert all(b - a > 0.03 for a, b in pairwise(heights))


def test_nothing_to_draw_is_an_error() -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="no method has both"):
        accuracy_figure([Panel(32_768, 32_768, [])], title="t")
