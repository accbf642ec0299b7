"""The head map: which pattern every head of a model uses, by layer and head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minference.head_patterns import HeadPatterns
from minference.patterns import Pattern

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 19
"""Patterns with a colour of their own; rarer ones share the last of twenty."""


def label_of(pattern: Pattern) -> str:
    """The kind with its budgets."""
    fields = pattern.to_dict()
    kind = fields.pop("kind")
    return f"{kind}({', '.join(f'{name}={value}' for name, value in fields.items())})"


def ranked_cells(table: HeadPatterns) -> tuple[list[list[int]], list[str]]:
    """Colour of each [layer][head], and the label of each colour, the commonest pattern first."""
    ranked = table.counts().most_common()
    colour = {pattern: min(rank, SHOWN) for rank, (pattern, _) in enumerate(ranked)}
    labels = [f"{label_of(pattern)}, {count} heads" for pattern, count in ranked[:SHOWN]]
    if len(ranked) > SHOWN:
        rest = ranked[SHOWN:]
        labels.append(f"{len(rest)} rarer patterns, {sum(count for _, count in rest)} heads")
    return [[colour[pattern] for pattern in row] for row in table.patterns], labels


def head_map_figure(table: HeadPatterns, *, title: str) -> Figure:
    """A square for each head, coloured by its pattern; layers downwards."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    cells, labels = ranked_cells(table)
    colours = colormaps["tab20"]
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(cells, cmap=colours, vmin=0, vmax=SHOWN, aspect="auto", interpolation="nearest")
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_title(title)
    keys = [Patch(color=colours(rank), label=label) for rank, label in enumerate(labels)]
    figure.legend(handles=keys, loc="outside right upper", fontsize=7)
    return figure
