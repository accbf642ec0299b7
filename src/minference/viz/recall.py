"""Recall against density: how much attention mass is kept for how much of the work.

Recall is the share of the softmax that fell on computed keys, density the share of the causal area
that was computed; both come from the prefill records of `minference eval`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class RecallPoint:
    """A layer, or a head of it, under a method: means over prefills.

    Attributes:
        method: label of the method.
        layer: number of the layer.
        head: number of the query head, None for all heads of the layer together.
        density: share of the causal area that was computed.
        recall: share of the attention mass that was kept.
    """

    method: str
    layer: int
    head: int | None
    density: float
    recall: float


def recall_points(records: Iterable[Mapping[str, Any]]) -> list[RecallPoint]:
    """Points of the prefill records that carry `recall` beside `density`, both lists by layer."""
    sums: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for record in records:
        if record["record"] == "prefill" and record.get("recall"):
            pairs = zip(record["density"], record["recall"], strict=True)
            for layer, (density, recall) in enumerate(pairs):
                total = sums[record["method"], layer]
                total[0] += 1
                total[1] += density
                total[2] += recall
    return [
        RecallPoint(method, layer, None, d / n, r / n)
        for (method, layer), (n, d, r) in sums.items()
    ]


def recall_figure(points: Sequence[RecallPoint], *, title: str) -> Figure:
    """Left: recall against density, a dot a layer or head and a diamond a method's mean.
    Right: the recall of each layer.

    Raises:
        ValueError: no point.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    if not points:
        raise ValueError(
            "no recall to draw: it is recorded of the prompts that `minference eval` reads by a "
            "sparse method, and these results hold none"
        )
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = colormaps["tab10"]
    for number, (method, own) in enumerate(_by_method(points).items()):
        colour = colours(number % 10)
        density, recall = [p.density for p in own], [p.recall for p in own]
        left.scatter(density, recall, s=14, color=colour, alpha=0.6)
        mean = sum(density) / len(own), sum(recall) / len(own)
        left.scatter(*mean, s=70, marker="D", color=colour, edgecolor="black", label=method)
        layers = _by_layer(own)
        right.plot(list(layers), list(layers.values()), marker="o", color=colour, label=method)
    left.set_xlabel("density: share of the causal area computed")
    left.set_ylabel("recall: share of the attention mass kept")
    left.set_xscale("log")
    left.xaxis.set_major_formatter("{x:.2g}")
    left.xaxis.set_minor_formatter("{x:.2g}")
    right.set_xlabel("layer")
    right.set_ylabel("recall, mean of the layer")
    for panel in (left, right):
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    figure.suptitle(title)
    return figure


def _by_method(points: Iterable[RecallPoint]) -> dict[str, list[RecallPoint]]:
    found: dict[str, list[RecallPoint]] = defaultdict(list)
    for point in points:
        found[point.method].append(point)
    return found


def _by_layer(points: Iterable[RecallPoint]) -> dict[int, float]:
    found: dict[int, list[float]] = defaultdict(list)
    for point in points:
        found[point.layer].append(point.recall)
    return {layer: sum(values) / len(values) for layer, values in sorted(found.items())}
