"""Accuracy lost against speed-up over dense attention: a point a method, one panel a length of the
times. Answers come from `minference eval`, times from `benchmarks/peer_times.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minference.bench.peers import MethodTime, Times
from minference.eval.statistics import Difference, answers_by_cell, difference_to

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINE = 0.032
"""Height of a label's line, as a share of the answers."""
_WIDTH = 32
_NAMES = {"fa3": "FlashAttention 3", "sdpa-fa2": "FlashAttention 2", "sdpa-cudnn": "cuDNN"}


@dataclass(frozen=True)
class AccuracyPoint:
    """A method.

    Attributes:
        method: label in the results.
        gap: right answers minus the dense model's, on the same questions.
        time: of the same method at the length of a panel.
    """

    method: str
    gap: Difference
    time: MethodTime


@dataclass(frozen=True)
class Panel:
    """Methods, and the lengths in tokens at which they answered and were timed."""

    answered: int
    timed: int
    points: Sequence[AccuracyPoint]


def accuracy_points(
    records: Iterable[Mapping[str, Any]],
    times: Times,
    answered: int,
    timed: int,
    *,
    placement: str = "spread",
) -> list[AccuracyPoint]:
    """Methods that have answers at one length and a time at one, the most accurate first.

    Args:
        records: of an evaluation.
        times: by length and method.
        answered: length of the prompts that were answered, in tokens.
        timed: length of the prompt that was timed.
        placement: where the questions were.
    """
    own = [
        record
        for record in records
        if record.get("length") == answered and record.get("placement") == placement
    ]
    answers = answers_by_cell(own)
    points = []
    for method in {name: None for by_method in answers.values() for name in by_method}:
        time, gap = times.get((timed, method)), difference_to(answers, method)
        if method != "dense" and time is not None and gap is not None:
            points.append(AccuracyPoint(method, gap, time))
    return sorted(points, key=lambda point: -point.gap.mean)


def accuracy_figure(panels: Sequence[Panel], *, title: str) -> Figure:
    """Panels side by side; up and to the right is better. Behind a method's label stands the
    density of what was timed.

    Raises:
        ValueError: no point in any panel.
    """
    from matplotlib.figure import Figure

    if not any(panel.points for panel in panels):
        raise ValueError(
            "no method has both answers and a time; name files of `minference eval` and of "
            "benchmarks/peer_times.py with the same methods"
        )
    figure = Figure(figsize=(6.6 * len(panels), 6.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, panel in zip(axes, panels, strict=True):
        _draw(axis, panel.points)
        over = ", ".join(sorted({_NAMES.get(p.time.over, p.time.over) for p in panel.points}))
        axis.set_title(
            f"answers at {panel.answered >> 10}K, time at {panel.timed >> 10}K tokens", fontsize=10
        )
        axis.set_xlabel(f"attention of a layer with its index,\ntimes as fast as {over}")
    axes[0].set_ylabel("share of the answers lost against dense, 95 % interval")
    axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=11)
    return figure


def _draw(axis: Axes, points: Sequence[AccuracyPoint]) -> None:
    from matplotlib import colormaps

    kinds = sorted({point.method.partition(":")[0] for point in points})
    axis.axvline(1, color="0.6", linewidth=0.8)
    axis.axhline(0, color="0.6", linewidth=0.8)
    axis.scatter([1], [0], marker="*", s=90, color="black", zorder=3)
    labels = [_label(point) for point in points]
    places = _label_places([-point.gap.mean for point in points], labels)
    for point, label, place in zip(points, labels, places, strict=True):
        colour = colormaps["tab10"](kinds.index(point.method.partition(":")[0]) % 10)
        lost, x = -point.gap.mean, point.time.speedup
        around = [[lost + point.gap.high], [-point.gap.low - lost]]
        axis.errorbar([x], [lost], yerr=around, color=colour, linewidth=1, capsize=2)
        axis.scatter([x], [lost], s=18, color=colour, zorder=3)
        axis.annotate(
            label,
            (x, lost),
            xytext=(1.03, place),
            textcoords=("axes fraction", "data"),
            fontsize=7,
            color=colour,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.4, "relpos": (0, 0.5)},
        )
    axis.annotate("dense", (1, 0), xytext=(6, 5), textcoords="offset points", fontsize=8)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.grid(alpha=0.25)


def _label(point: AccuracyPoint) -> str:
    """The method, on as many short lines as its options need, and its density."""
    name, colon, options = point.method.partition(":")
    lines = [name + colon]
    for option in filter(None, options.split(",")):
        comma = "," if len(lines) > 1 or lines[0] != name + colon else ""
        if len(lines[-1]) + len(option) > _WIDTH:
            lines[-1] += comma
            lines.append(option)
        else:
            lines[-1] += comma + option
    return "\n".join(lines) + f"  ({point.time.density:.0%})"


def _label_places(wanted: Sequence[float], labels: Sequence[str]) -> list[float]:
    """Ascending heights of labels that do not touch, as near to the wanted ones as pushing down
    leaves."""
    places: list[float] = []
    free = -1.0
    for height, label in zip(wanted, labels, strict=True):
        half = _LINE * (1 + label.count("\n")) / 2
        places.append(max(height, free + half))
        free = places[-1] + half
    return places
