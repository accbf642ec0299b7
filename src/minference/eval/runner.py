"""Runs cells: each prompt is drawn once and read by every method; goes on after a kill."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minference.eval.facts import (
    check_same,
    check_same_depths,
    check_same_texts,
    content_hash,
    run_facts,
)
from minference.eval.plan import Cell, draw, draw_all
from minference.eval.records import Record, Records, key_of
from minference.eval.scoring import Reading, encode, read_sample
from minference.eval.tasks import Sample
from minference.eval.tasks.draft import Measure
from minference.eval.tasks.haystack import documents
from minference.methods import Method, Static
from minference.methods.spec import MethodSpec, build_method

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Subject:
    """The model under test; `name` is what its records say."""

    name: str
    model: Any
    tokenizer: Any

    def measure(self) -> Measure:
        """Counts tokens."""
        return measure_of(self.tokenizer)


@dataclass(frozen=True)
class TokenCount:
    """Tokens of a text; a class, so that other processes can be given it."""

    tokenizer: Any

    def __call__(self, text: str) -> int:
        return len(encode(self.tokenizer, text))


def measure_of(tokenizer: Any) -> Measure:  # noqa: ANN401
    """Counts tokens; by characters where the tokenizer has one for each."""
    probe = "def f(x):\n    return 'a b c', 1234567\n"
    return len if len(encode(tokenizer, probe)) == len(probe) else TokenCount(tokenizer)


def default_workers(device_type: str) -> int:
    """Processes that write prompts: as many as the machine has to spare beside a GPU, at most 8."""
    return min(8, (os.cpu_count() or 1) - 1) if device_type == "cuda" else 0


def run_cells(
    subject: Subject,
    specs: list[MethodSpec],
    cells: Iterable[Cell],
    folder: Path,
    *,
    command: str = "",
    progress: Progress | None = None,
    workers: int = 0,
) -> Records:
    """Asks what the folder does not hold yet.

    Args:
        subject: the model.
        specs: methods; each gets the same prompts.
        cells: what to ask.
        folder: where `samples.jsonl` lies or will lie.
        command: what was typed, for the record.
        progress: called with (prompts done, prompts in all, what comes next).
        workers: processes that write prompts ahead of the model; 0 writes them in turn.

    Raises:
        ValueError: the folder holds results of another model, of another method of the same label
            or of prompts with other texts or depths, or a method refuses its options.
    """
    cells = list(cells)
    records, facts = Records.open(folder), run_facts(subject, specs, command)
    facts["texts"] = content_hash(documents(held_out=True))
    facts["depths"] = max((cell.depths for cell in cells), default=0)
    check_same(records, facts)
    check_same_texts(records, facts)
    check_same_depths(records, facts)
    todo = [(cell, seed) for cell in cells for seed in range(cell.prompts)]
    done = records.done()
    work = [
        (cell, seed, missing)
        for cell, seed in todo
        if any((missing := {s: _missing(cell, seed, s.label, done) for s in specs}).values())
    ]
    records.append([facts])
    measure = subject.measure()
    methods: dict[tuple[Cell, str], Method] = {}
    samples = draw_all([cell.order(seed) for cell, seed, _ in work], measure, workers)
    before = len(todo) - len(work)
    # a pool of processes ends with this block, also after an error or an interruption
    with closing(samples):
        for number, (cell, _, missing) in enumerate(work):
            if progress:
                what = f"{cell.task} {cell.length} {cell.placement}"
                progress(before + number, len(todo), what)
            sample = next(samples)
            for spec in (spec for spec in specs if missing[spec]):
                if (cell, spec.label) not in methods:
                    methods[cell, spec.label] = _prepare(subject, spec, cell, measure)
                skip = frozenset(range(cell.questions)) - missing[spec]
                method = methods[cell, spec.label]
                readings = read_sample(subject.model, subject.tokenizer, method, sample, skip=skip)
                records.append(_lines(cell, sample, spec.label, readings, missing[spec]))
    if progress:
        progress(len(todo), len(todo), "done")
    return records


def _prepare(subject: Subject, spec: MethodSpec, cell: Cell, measure: Measure) -> Method:
    """A fresh method; a static one first reads a development prompt."""
    method = build_method(spec, subject.model.config)
    if isinstance(method, Static):
        task, length, _, _, questions, placement, depth = cell.order(0)
        order = task, length, 0, "dev", questions, placement, depth
        skip = frozenset(range(1, cell.questions))
        read_sample(subject.model, subject.tokenizer, method, draw(order, measure), skip=skip)
    return method


def _base(cell: Cell, seed: int, method: str) -> Record:
    return {
        "task": cell.task,
        "length": cell.length,
        "placement": cell.placement,
        "split": cell.split,
        "seed": seed,
        "questions": cell.questions,
        "method": method,
    }


def _missing(cell: Cell, seed: int, method: str, done: set[tuple[Any, ...]]) -> set[int]:
    base = _base(cell, seed, method)
    return {i for i in range(cell.questions) if key_of(base | {"index": i}) not in done}


def _lines(
    cell: Cell, sample: Sample, method: str, readings: list[Reading], missing: set[int]
) -> list[Record]:
    base = _base(cell, sample.seed, method)
    lines: list[Record] = []
    for reading in readings:
        # one that answers a single question has its number
        alone = reading.outcomes[0].index if len(reading.outcomes) == 1 else None
        measured = {
            "index": alone,
            "tokens": reading.tokens,
            "seconds": round(reading.seconds, 4),
            **asdict(reading.layers),
        }
        lines.append({"record": "prefill", **base, **measured})
        for outcome in (outcome for outcome in reading.outcomes if outcome.index in missing):
            question = sample.questions[outcome.index]
            line = {"record": "question", **base, "index": outcome.index}
            line |= {"depth": question.depth and round(question.depth, 4)}
            line |= {"correct": int(outcome.correct), "answer": question.answer}
            lines.append(line if outcome.correct else line | {"got": outcome.got})
    return lines
