"""Pictures of a search: the head map of its table, and kept mass against density head by head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minference.search.found import Found
from minference.viz.head_map import head_map_figure
from minference.viz.recall import RecallPoint, recall_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def head_map(found: Found) -> Figure:
    """A square for each head, coloured by its pattern."""
    name = found.patterns.provenance.model or "head patterns"
    return head_map_figure(found.patterns, title=f"{name}, budgets for 128K tokens")


def recall(found: Found) -> Figure:
    """Kept mass of each head against its density at the longest prompt, a colour a kind."""
    length = max(found.lengths)
    points = [
        RecallPoint(pattern.kind, layer, head, found.cost.density(pattern, length), kept)
        for layer, row, mass in zip(
            found.layers, found.served_rows(length), found.scores["mass"], strict=True
        )
        for head, (pattern, kept) in enumerate(zip(row, mass, strict=True))
    ]
    return recall_figure(points, title=f"heads at {length} tokens, density predicted")
