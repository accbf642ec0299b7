"""The published JSON lines: one example a line, with id, context, input, answer and options."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minference.errors import unknown_name

TASKS = (
    "passkey",
    "number_string",
    "kv_retrieval",
    "longbook_sum_eng",
    "longbook_choice_eng",
    "longbook_qa_eng",
    "longbook_qa_chn",
    "longdialogue_qa_eng",
    "math_find",
    "math_calc",
    "code_run",
    "code_debug",
)
_FIELDS = ("context", "input", "answer")


@dataclass(frozen=True)
class Example:
    """One example of the benchmark.

    Attributes:
        task: its task, one of `TASKS`.
        id: what the file calls it; its line where the file says nothing.
        context: the long text.
        input: the question.
        answers: accepted answers; for math_calc the values in order.
        options: choices of the multiple-choice tasks.
    """

    task: str
    id: int | str
    context: str
    input: str
    answers: tuple[Any, ...]
    options: tuple[str, ...] = ()


def read_examples(path: Path, task: str | None = None) -> Iterator[Example]:
    """Examples of a file, one at a time; the task is the file's name unless given.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown task, or a line that is no example; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no InfiniteBench file at {str(path)!r}")
    name = path.stem if task is None else task
    if name not in TASKS:
        raise unknown_name("InfiniteBench task", name, TASKS)
    return _lines(path, name)


def to_line(example: Example) -> str:
    """An example as a line of the published files."""
    answer = list(example.answers)
    fields = {"id": example.id, "context": example.context, "input": example.input}
    rest = {"answer": answer, "options": list(example.options)}
    return json.dumps(fields | rest, ensure_ascii=False) + "\n"


def _lines(path: Path, task: str) -> Iterator[Example]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
            yield _example(path, number, task, record)


def _example(path: Path, number: int, task: str, record: object) -> Example:
    fields = record if isinstance(record, Mapping) else {}
    # early files say content for context
    known = {"context": fields.get("content"), **fields}
    missing = [name for name in _FIELDS if known.get(name) is None]
    if missing:
        raise ValueError(
            f"{path}, line {number} must be an object with {', '.join(_FIELDS)}, without "
            f"{', '.join(missing)}"
        )
    answer = known["answer"]
    answers = tuple(answer) if isinstance(answer, list) else (answer,)
    if len(answers) == 1 and isinstance(answers[0], list):
        answers = tuple(answers[0])
    if not answers:
        raise ValueError(f"{path}, line {number} must have an answer, got an empty list")
    return Example(
        task,
        fields.get("id", number - 1),
        str(known["context"]),
        str(known["input"]),
        answers,
        tuple(str(option) for option in fields.get("options") or ()),
    )
