"""Rows of training text on CPU processes: contexts, questions, answers, and what each byte is.

A batch depends on the recipe, its seed and the step alone, so a resumed run sees what an unbroken
one would have seen.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from random import Random

import numpy as np

from minference.eval.tasks import ONE_QUESTION, Sample, make_sample
from minference.eval.tasks.haystack import prose
from training.config import Phase, Recipe

TEXT, FILL, ANSWER = 1, 2, 3
_LAST_QUESTION = 255
_CHANCES = {
    "single": 7,
    "single_noise": 4,
    "single_uuid": 6,
    "multikey": 14,
    "multivalue": 12,
    "needle_lines": 9,
    "uuid_lines": 6,
    "key_value": 18,
    "variable_tracking": 18,
    "common_words": 3,
    "frequent_words": 3,
    "passkey": 2,
    "number_string": 2,
}
_SLOW = {"variable_tracking", "multivalue"}
_PROSE = {"single", "single_uuid", "multikey", "multivalue"}
# context bytes for each question at most asked about it, and the most questions of a context
_QUESTIONS = {
    "single": (350, 24),
    "single_noise": (350, 24),
    "single_uuid": (420, 24),
    "multikey": (550, 48),
    "multivalue": (700, 24),
    "needle_lines": (400, 48),
    "uuid_lines": (550, 40),
    "key_value": (330, 64),
    "variable_tracking": (550, 16),
}


@dataclass(frozen=True)
class Batch:
    """Bytes and what they are.

    Attributes:
        data: [B, L], uint8.
        kinds: [B, L], uint8: TEXT, FILL (random or repeated, hardly weighted), or ANSWER and above,
            one number for each question of a row.
        tasks: name of the question's task by (row, kind).
    """

    data: np.ndarray
    kinds: np.ndarray
    tasks: dict[tuple[int, int], str]


def make_batch(recipe: Recipe, step: int) -> Batch:
    """The rows of one step."""
    phase, _ = recipe.at(step)
    rng = Random(f"{recipe.seed}/{step}")
    rows = [make_row(rng, phase) for _ in range(recipe.step_tokens // phase.length)]
    return Batch(
        np.stack([row[0] for row in rows]),
        np.stack([row[1] for row in rows]),
        {(at, kind): task for at, row in enumerate(rows) for kind, task in row[2].items()},
    )


def batches(recipe: Recipe, start: int, workers: int) -> Iterator[Batch]:
    """Batches of the remaining steps, built ahead on so many processes."""
    steps = range(start, recipe.steps)
    if workers == 0:
        for step in steps:
            yield make_batch(recipe, step)
        return
    ahead = 3 * workers
    with get_context("spawn").Pool(workers, initializer=_quiet) as pool:
        waiting = [pool.apply_async(make_batch, (recipe, step)) for step in steps[:ahead]]
        for step in steps:
            if step + ahead < recipe.steps:
                waiting.append(pool.apply_async(make_batch, (recipe, step + ahead)))
            yield waiting.pop(0).get()


def make_row(rng: Random, phase: Phase) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """One row of exactly `phase.length` bytes, its kinds, and the task of each question."""
    samples = _samples(rng, phase)
    pieces: list[tuple[str, int]] = []
    if rng.random() < 0.7:
        pieces += [(sample.prompt, _base(sample)) for sample in samples]
        turns = [(sample, at) for sample in samples for at in range(len(sample.questions))]
        if len(samples) > 1:
            rng.shuffle(turns)
        tasks = _ask(turns, pieces)
    else:
        tasks = {}
        for sample in samples:
            pieces.append((sample.prompt, _base(sample)))
            turns = [(sample, at) for at in range(len(sample.questions))]
            tasks |= _ask(turns, pieces, ANSWER + len(tasks))
    data = np.frombuffer("".join(text for text, _ in pieces).encode("ascii"), np.uint8)
    kinds = np.repeat(
        np.array([kind for _, kind in pieces], np.uint8), [len(text) for text, _ in pieces]
    )
    data, kinds = _pad(rng, data, phase.length), _pad(None, kinds, phase.length)
    # an answer that the row's end cuts off cannot be right or wrong
    whole = set(kinds[data == ord("\n")].tolist())
    return data, kinds, {kind: task for kind, task in tasks.items() if kind in whole}


def _samples(rng: Random, phase: Phase) -> list[Sample]:
    count = 1
    if rng.random() < phase.mixed and phase.length >= 4096:
        count = rng.randint(2, 3 if phase.length < 16_384 else 5)
    lengths = _lengths(rng, phase.length, count)
    names = _draw_tasks(rng, count, room=min(lengths), boost=phase.boost)
    return [
        _sample(rng, name, length, phase.lone_chains)
        for name, length in zip(names, lengths, strict=True)
    ]


def _draw_tasks(rng: Random, count: int, room: int, boost: float) -> list[str]:
    chances = [chance * (boost if name in _SLOW else 1.0) for name, chance in _CHANCES.items()]
    names: list[str] = []
    while len(names) < count:
        name = rng.choices(list(_CHANCES), chances)[0]
        if name not in names and (room >= 1900 or name != "common_words"):
            names.append(name)
    return names


def _lengths(rng: Random, total: int, count: int) -> list[int]:
    shares = [rng.uniform(0.5, 1.5) for _ in range(count)]
    return [int(total * share / sum(shares)) for share in shares]


def _sample(rng: Random, name: str, length: int, lone_chains: float) -> Sample:
    """A sample whose solved text is at most `length` bytes."""
    count, seed = 1, rng.getrandbits(60)
    if name in _QUESTIONS and rng.random() > lone_chains * (name == "variable_tracking"):
        per_question, most = _QUESTIONS[name]
        most = max(1, min(most, length // per_question))
        count = max(rng.randint(1, most), rng.randint(1, most))
    spread = rng.random() < 0.5
    inner = length
    for _ in range(4):
        sample = make_sample(
            name,
            inner,
            seed,
            "train",
            num_questions=count,
            placement="spread" if spread and name not in ONE_QUESTION else "end",
        )
        over = len(sample.solved()[0]) - length
        if over <= 0:
            return sample
        inner -= over
    return sample


def _base(sample: Sample) -> int:
    return TEXT if sample.task in _PROSE else FILL


def _ask(
    turns: list[tuple[Sample, int]], pieces: list[tuple[str, int]], first: int = ANSWER
) -> dict[int, str]:
    tasks: dict[int, str] = {}
    for kind, (sample, at) in enumerate(turns, first):
        kind = min(kind, _LAST_QUESTION)
        question = sample.questions[at]
        pieces.append((question.prompt, _base(sample)))
        pieces.append((question.solved[len(question.prompt) :], kind))
        tasks[kind] = sample.task
    return tasks


def _pad(rng: Random | None, row: np.ndarray, length: int) -> np.ndarray:
    missing = length - len(row)
    if missing <= 0:
        return row[:length]
    if rng is None:
        return np.concatenate((row, np.full(missing, TEXT, np.uint8)))
    text = "\n" + prose(rng, "train", missing)
    return np.concatenate((row, np.frombuffer(text.encode("ascii"), np.uint8)[:missing]))


def _quiet() -> None:
    # one process, one core: the pool is the parallelism
    os.environ["OMP_NUM_THREADS"] = "1"
