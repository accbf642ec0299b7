"""Accuracy lost against speed-up over dense attention: a point a method, one panel a length of the
times. Answers come from `minference eval`, times from `benchmarks/peer_times.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minference.bench.peers import MethodTime, Times
from minference.eval.statistics import Difference, answers_by_cell, difference_to
from minference.eval.tables import REPORTED

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
    """Methods at one length of the answers and one of the times.

    Attributes:
        answered: length of the prompts that were answered, in tokens.
        timed: length of the prompt that was timed.
        points: the most accurate first.
        tasks: those that count, which are the ones that every method here was asked.
        others: tasks that only some of the methods were asked.
    """

    answered: int
    timed: int
    points: Sequence[AccuracyPoint]
    tasks: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


def accuracy_panel(
    records: Iterable[Mapping[str, Any]],
    times: Times,
    answered: int,
    timed: int,
    *,
    placement: str = "spread",
    split: str = REPORTED,
) -> Panel:
    """Methods that have answers at one length and a time at one.

    Args:
        records: of an evaluation.
        times: by length and method.
        answered: length of the prompts that were answered, in tokens.
        timed: length of the prompt that was timed.
        placement: where the questions were.
        split: whose seeds they have, "heldout" or "dev".
    """
    where = answered, placement, split
    answers = answers_by_cell(
        record
        for record in records
        if tuple(map(record.get, ("length", "placement", "split"))) == where
    )
    asked = {name: None for by_method in answers.values() for name in by_method}
    methods = [name for name in asked if name != "dense" and (timed, name) in times]
    common = {cell: by for cell, by in answers.items() if by.keys() >= {"dense", *methods}}
    points = [
        AccuracyPoint(method, gap, times[timed, method])
        for method in methods
        if (gap := difference_to(common, method)) is not None
    ]
    tasks = tuple(cell[0] for cell in common)
    others = tuple(cell[0] for cell in answers if cell not in common)
    return Panel(answered, timed, sorted(points, key=lambda p: -p.gap.mean), tasks, others)


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
    kinds = sorted({_kind(point) for panel in panels for point in panel.points})
    figure = Figure(figsize=(6.6 * len(panels), 6.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, panel in zip(axes, panels, strict=True):
        _draw(axis, panel.points, kinds)
        over = ", ".join(sorted({_NAMES.get(p.time.over, p.time.over) for p in panel.points}))
        where = f"answers at {panel.answered >> 10}K, time at {panel.timed >> 10}K tokens"
        if panel.others:
            where += "\n" + f"{', '.join(panel.tasks)} alone".replace("_", " ")
        axis.set_title(where, fontsize=10)
        axis.set_xlabel(f"attention of a layer with its index,\ntimes as fast as {over}")
    axes[0].set_ylabel("share of the answers lost against dense, 95 % interval")
    axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=11)
    return figure


def _kind(point: AccuracyPoint) -> str:
    return point.method.partition(":")[0]


def _draw(axis: Axes, points: Sequence[AccuracyPoint], kinds: Sequence[str]) -> None:
    from matplotlib import colormaps

    axis.axvline(1, color="0.6", linewidth=0.8)
    axis.axhline(0, color="0.6", linewidth=0.8)
    axis.scatter([1], [0], marker="*", s=90, color="black", zorder=3)
    labels = [_label(point) for point in points]
    places = _label_places([-point.gap.mean for point in points], labels)
    for point, label, place in zip(points, labels, places, strict=True):
        colour = colormaps["tab10"](kinds.index(_kind(point)) % 10)
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
