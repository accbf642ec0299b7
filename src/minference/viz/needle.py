"""Needle heat maps: exact match by length and depth, dense beside sparse and their difference.

Reads the question records of `minference eval`; knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

DEPTHS = 5
"""Rows of a map of results that do not say at how many depths their needles were placed."""
_TEXT_CELLS = 150


@dataclass(frozen=True)
class NeedleGrid:
    """Exact match of a method by depth and length.

    Attributes:
        lengths: prompt lengths in tokens, ascending, one a column.
        depths: share of the context before the needle, 0 first, one a row.
        mean: [depth, length], NaN where nothing was asked; of a difference, sparse minus dense.
        count: questions in each cell.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    mean: np.ndarray
    count: np.ndarray


def needle_grids(
    records: Iterable[Mapping[str, Any]],
    method: str,
    *,
    baseline: str = "dense",
    task: str = "niah",
    rows: int | None = None,
) -> tuple[NeedleGrid, NeedleGrid, NeedleGrid]:
    """The baseline's map, the method's map, and the difference on the questions both answered.

    A needle counts for the nearest of `rows` evenly spread depths: as many as its run placed
    needles at unless given.

    Raises:
        ValueError: no question of that task and method has a depth.
    """
    lines = list(records)
    rows = _depths(lines) if rows is None else rows
    if rows < 2:
        raise ValueError(f"a map needs at least 2 rows, got {rows}")
    asked = _asked(lines, task)
    if not asked.get(method):
        raise ValueError(
            f"no needle to draw: expected questions of task {task!r} and method {method!r} with a "
            f"depth; there are {_listed(asked)}"
        )
    lengths = tuple(sorted({key[0] for answers in asked.values() for key in answers}))
    own, base = asked[method], asked.get(baseline, {})
    common = own.keys() & base.keys()
    difference = {key: (own[key][0], own[key][1] - base[key][1]) for key in common}
    first, second, third = (_grid(found, lengths, rows) for found in (base, own, difference))
    return first, second, third


def needle_methods(records: Iterable[Mapping[str, Any]], task: str = "niah") -> list[str]:
    """Methods with a needle to draw, in the order of the records."""
    return list(_asked(records, task))


def needle_figure(
    maps: Mapping[str, NeedleGrid], difference: NeedleGrid | None = None, *, title: str
) -> Figure:
    """Maps side by side on one scale from 0 to 1, and the difference from -1 to 1.

    Maps without a question are left out, cells without one are grey.
    """
    from matplotlib.figure import Figure

    shown = {name: grid for name, grid in maps.items() if grid.count.any()}
    signed = difference if difference is not None and difference.count.any() else None
    panels = len(shown) + (signed is not None)
    grid = next(iter(shown.values()))
    size = 1 + panels * max(3.0, 0.6 * len(grid.lengths) + 1), 1.6 + 0.42 * len(grid.depths)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    images = [_draw(axis, *entry) for axis, entry in zip(axes, shown.items(), strict=False)]
    figure.colorbar(images[-1], ax=axes[: len(shown)].tolist(), label="exact match")
    if signed is not None:
        image = _draw(axes[-1], "difference", signed, signed=True)
        figure.colorbar(image, ax=axes[-1], label="sparse minus dense")
    axes[0].set_ylabel("depth of the needle")
    figure.suptitle(title)
    return figure


def _depths(records: Iterable[Mapping[str, Any]]) -> int:
    """Most depths of a run, 2 at least, so that a map has both ends."""
    noted = [record["depths"] for record in records if record.get("depths")]
    return max(2, *noted) if noted else DEPTHS


def _asked(
    records: Iterable[Mapping[str, Any]], task: str
) -> dict[str, dict[tuple[Any, ...], tuple[float, float]]]:
    """Depth and correctness by method and question."""
    found: dict[str, dict[tuple[Any, ...], tuple[float, float]]] = {}
    for record in records:
        wanted = record["record"] == "question" and record["task"] == task
        if wanted and record.get("depth") is not None:
            key = tuple(record.get(name) for name in ("length", "placement", "split", "seed"))
            key += record.get("questions"), record["index"]
            answer = float(record["depth"]), float(record["correct"])
            found.setdefault(record["method"], {})[key] = answer
    return found


def _grid(
    answers: Mapping[tuple[Any, ...], tuple[float, float]], lengths: tuple[int, ...], rows: int
) -> NeedleGrid:
    total = np.zeros((rows, len(lengths)))
    count = np.zeros((rows, len(lengths)), dtype=int)
    for key, (depth, value) in answers.items():
        place = round(min(max(depth, 0.0), 1.0) * (rows - 1)), lengths.index(key[0])
        total[place] += value
        count[place] += 1
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return NeedleGrid(lengths, tuple(row / (rows - 1) for row in range(rows)), mean, count)


def _draw(panel: Axes, name: str, grid: NeedleGrid, *, signed: bool = False) -> AxesImage:
    low, colours = (-1.0, "RdBu") if signed else (0.0, "viridis")
    image = panel.imshow(
        np.ma.masked_invalid(grid.mean), vmin=low, vmax=1.0, cmap=colours, aspect="auto"
    )
    panel.set_facecolor("0.85")
    panel.set_title(name, fontsize=9)
    panel.set_xticks(range(len(grid.lengths)), [_tokens(n) for n in grid.lengths])
    panel.set_yticks(range(len(grid.depths)), [f"{depth:.0%}" for depth in grid.depths])
    panel.set_xlabel("tokens")
    if grid.mean.size <= _TEXT_CELLS:
        for (row, column), mean in np.ndenumerate(grid.mean):
            if grid.count[row, column]:
                dark = abs(mean) > 0.6 if signed else mean < 0.6
                text = f"{mean:+.2f}" if signed else f"{mean:.2f}"
                colour = "white" if dark else "black"
                panel.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    return image


def _tokens(length: int) -> str:
    return f"{length >> 10}K" if length % 1024 == 0 else str(length)


def _listed(asked: Mapping[str, object]) -> str:
    return f"methods {', '.join(sorted(asked))}" if asked else "none of any method"
