"""Results as a markdown table: accuracy, difference to dense, density, recall, time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from minference.eval.statistics import (
    Answers,
    Score,
    answers_by_cell,
    paired_difference,
    scores,
)

BASELINE = "dense"
REPORTED = "heldout"
ALL = 0.995  # the density that two digits show as everything
_HEAD = (
    "| task | length | questions | method | exact match | to dense | density | layers | recall "
    "| layers | prefill |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def markdown_table(records: Iterable[Mapping[str, Any]]) -> str:
    """One row for each cell and method; intervals are 95 %.

    `to dense` is the paired difference on the same questions, bootstrapped over prompts; `layers`
    is the range over the layers of the column before it, so that a layer which is secretly dense,
    or one that lost its mass, shows. A method that computed everything though it is not called
    dense is marked `(dense)`.
    """
    lines = list(records)
    answers = answers_by_cell(lines)
    rows = [_HEAD]
    for cell, methods in sorted(scores(lines).items()):
        task, length, placement, split = cell
        own, where = answers[cell], placement if split == REPORTED else f"{placement}, {split}"
        for method, score in sorted(methods.items(), key=lambda own: own[0] != BASELINE):
            asked = f"{score.total} on {score.prompts} prompts, {where}"
            cells = (task, str(length), asked, f"`{method}`", *_measured(score, method, own))
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _measured(score: Score, method: str, answers: Mapping[str, Answers]) -> tuple[str, ...]:
    accuracy = f"{score.accuracy:.3f} ({score.low:.3f} to {score.high:.3f})"
    found = None
    if method != BASELINE and BASELINE in answers:
        found = paired_difference(answers[method], answers[BASELINE])
    against = f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})" if found else "-"
    density = "-" if score.density is None else f"{score.density:.3f}"
    if method != BASELINE and score.density is not None and score.density >= ALL:
        density += " (dense)"
    recall = "-" if score.recall is None else f"{score.recall:.3f}"
    seconds = "-" if score.seconds is None else f"{score.seconds:.2f} s"
    layers, recalls = _range(score.layers), _range(score.recalls)
    return accuracy, against, density, layers, recall, recalls, seconds


def _range(values: tuple[float, ...]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}" if values else "-"
