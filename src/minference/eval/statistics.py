"""Accuracy, and paired differences with intervals: questions of a prompt are not independent."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

CellKey = tuple[str, int, str, str]
"""Task, length, placement and split."""
_Z = 1.959964
_RESAMPLES = 4000


@dataclass(frozen=True)
class Score:
    """A method in a cell.

    Attributes:
        correct: questions answered exactly.
        total: questions asked.
        prompts: different prompts among them.
        low: lower end of Wilson's 95 % interval of the accuracy.
        high: upper end.
        density: mean share of the causal area computed, None if it was not recorded.
        layers: the same by layer.
        recall: mean share of the attention mass kept, over sampled rows, heads and layers.
        recalls: the same by layer.
        seconds: median time of a prefill.
    """

    correct: int
    total: int
    prompts: int
    low: float
    high: float
    density: float | None = None
    layers: tuple[float, ...] = ()
    recall: float | None = None
    recalls: tuple[float, ...] = ()
    seconds: float | None = None

    @property
    def accuracy(self) -> float:
        """Share of questions answered exactly."""
        return self.correct / self.total


@dataclass(frozen=True)
class Difference:
    """Accuracy minus the baseline's on the questions that both answered, with a 95 % interval."""

    mean: float
    low: float
    high: float
    questions: int


Prompt = tuple[int, int]
"""Seed, and how many questions the prompt has: one with more is another prompt."""
Answers = dict[tuple[Prompt, int], bool]
"""Right or wrong by prompt and question."""


def cell_key(record: Mapping[str, Any]) -> CellKey:
    """The cell of a result."""
    return record["task"], record["length"], record["placement"], record["split"]


def prompt_of(record: Mapping[str, Any]) -> Prompt:
    """The prompt of a result in its cell."""
    return record["seed"], record["questions"]


def answers_by_cell(records: Iterable[Mapping[str, Any]]) -> dict[CellKey, dict[str, Answers]]:
    """Right or wrong by cell, method, prompt and question."""
    cells: dict[CellKey, dict[str, Answers]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        if record["record"] == "question":
            place = prompt_of(record), record["index"]
            cells[cell_key(record)][record["method"]][place] = bool(record["correct"])
    return {cell: dict(methods) for cell, methods in cells.items()}


def last_prefills(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The prefills, each once: a prompt that was asked again counts by its last."""
    found = {
        (*cell_key(record), record["method"], prompt_of(record), record.get("index")): record
        for record in records
        if record["record"] == "prefill"
    }
    return list(found.values())


def scores(records: Iterable[Mapping[str, Any]]) -> dict[CellKey, dict[str, Score]]:
    """Scores by cell and method, with the densities and times of the prefills."""
    lines = list(records)
    prefills: dict[tuple[CellKey, str], list[Mapping[str, Any]]] = defaultdict(list)
    for record in last_prefills(lines):
        prefills[cell_key(record), record["method"]].append(record)
    return {
        cell: {
            method: _score(answers, prefills[cell, method]) for method, answers in methods.items()
        }
        for cell, methods in answers_by_cell(lines).items()
    }


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    share = correct / total
    middle = share + _Z**2 / (2 * total)
    spread = _Z * math.sqrt(share * (1 - share) / total + _Z**2 / (4 * total**2))
    scale = 1 + _Z**2 / total
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def paired_difference(
    answers: Mapping[tuple[Any, int], float],
    baseline: Mapping[tuple[Any, int], float],
    *,
    seed: int = 0,
) -> Difference | None:
    """Mean difference and its bootstrap interval over prompts; None without a common question.

    Keys are (prompt, question), values right or wrong, or any number. Prompts are drawn with
    replacement, all questions of a prompt together.
    """
    by_prompt: dict[Any, list[float]] = defaultdict(list)
    for place in (place for place in answers if place in baseline):
        by_prompt[place[0]].append(float(answers[place]) - float(baseline[place]))
    if not by_prompt:
        return None
    sums = torch.tensor([sum(found) for found in by_prompt.values()], dtype=torch.float64)
    sizes = torch.tensor([float(len(found)) for found in by_prompt.values()], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(sums), (_RESAMPLES, len(sums)), generator=generator)
    means = sums[picks].sum(1) / sizes[picks].sum(1)
    low, high = (float(torch.quantile(means, q)) for q in (0.025, 0.975))
    return Difference(float(sums.sum() / sizes.sum()), low, high, int(sizes.sum()))


def difference_to(
    answers: Mapping[CellKey, Mapping[str, Answers]], method: str, baseline: str = "dense"
) -> Difference | None:
    """`paired_difference` of a method over the cells of `answers_by_cell`, put together; prompts of
    different cells are different ones."""
    pooled: tuple[dict[Any, bool], dict[Any, bool]] = {}, {}
    for cell, by_method in answers.items():
        for into, name in zip(pooled, (method, baseline), strict=True):
            for (prompt, index), right in by_method.get(name, {}).items():
                into[(cell, prompt), index] = right
    return paired_difference(*pooled)


def _score(answers: Answers, prefills: list[Mapping[str, Any]]) -> Score:
    correct, total = sum(answers.values()), len(answers)
    low, high = wilson(correct, total)
    layers, recalls = _by_layer(prefills, "density"), _by_layer(prefills, "recall")
    seconds = sorted(record["seconds"] for record in prefills if "seconds" in record)
    return Score(
        correct,
        total,
        len({prompt for prompt, _ in answers}),
        low,
        high,
        sum(layers) / len(layers) if layers else None,
        layers,
        sum(recalls) / len(recalls) if recalls else None,
        recalls,
        seconds[len(seconds) // 2] if seconds else None,
    )


def _by_layer(prefills: list[Mapping[str, Any]], name: str) -> tuple[float, ...]:
    """Mean of a list by layer over the prefills that recorded it."""
    found = [record[name] for record in prefills if record.get(name)]
    return tuple(sum(column) / len(column) for column in zip(*found, strict=True))
