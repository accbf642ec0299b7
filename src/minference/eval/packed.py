"""Results small enough to commit: a line for each cell and method instead of one a question.

    {"record": "cell", "task": "single", ..., "method": "dense", "seeds": [0, 25],
     "correct": "111111111111 110111111111 ...", "density": [1.0, ...], "recall": [...]}

A word of `correct` is a prompt, a digit a question, `-` one that was not asked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from minference.eval.statistics import last_prefills

Record = dict[str, Any]
CELL = ("task", "length", "placement", "split", "questions", "method")
"""Fields that name a cell and a method."""
_BY_LAYER = ("density", "recall", "recall_min", "output_error")


def pack(records: Iterable[Mapping[str, Any]]) -> list[Record]:
    """The run lines as they are, then a line for each cell and method.

    What a prefill measured by layer becomes its mean over the prompts, its seconds the median.
    """
    runs: list[Record] = []
    questions: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    prefills: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    lines = list(records)
    for record in lines:
        if record["record"] == "run":
            runs.append(dict(record))
        elif record["record"] == "question":
            questions[tuple(record[name] for name in CELL)].append(record)
    for record in last_prefills(lines):
        prefills[tuple(record[name] for name in CELL)].append(record)
    return runs + [_line(cell, own, prefills[cell]) for cell, own in questions.items()]


def unpack(line: Mapping[str, Any]) -> Iterator[Record]:
    """Question lines of a packed one, and one prefill line with the means."""
    base = {name: line[name] for name in CELL}
    depths = line.get("depth")
    for place, word in enumerate(line["correct"].split()):
        seed = line["seeds"][0] + place
        for index, flag in enumerate(word):
            if flag == "-":
                continue
            asked = {"record": "question", **base, "seed": seed, "index": index}
            depth = None if depths is None else depths[place]
            yield asked | {"correct": int(flag), "depth": depth}
    means = {name: line[name] for name in (*_BY_LAYER, "seconds", "tokens") if name in line}
    yield {"record": "prefill", **base, "seed": line["seeds"][0], **means}


def _line(
    cell: tuple[Any, ...], asked: list[Mapping[str, Any]], read: list[Mapping[str, Any]]
) -> Record:
    base: Record = {"record": "cell", **dict(zip(CELL, cell, strict=True))}
    first, last = (pick(record["seed"] for record in asked) for pick in (min, max))
    words = [["-"] * base["questions"] for _ in range(first, last + 1)]
    depths: list[Any] = [None] * len(words)
    for record in asked:
        words[record["seed"] - first][record["index"]] = str(int(record["correct"]))
        depths[record["seed"] - first] = record.get("depth")
    line = base | {"seeds": [first, last + 1], "correct": " ".join("".join(w) for w in words)}
    if base["task"] == "niah":
        line["depth"] = depths
    for name in _BY_LAYER:
        found = [record[name] for record in read if record.get(name)]
        if found:
            columns = zip(*found, strict=True)
            line[name] = [round(sum(column) / len(found), 4) for column in columns]
    seconds = sorted(record["seconds"] for record in read if "seconds" in record)
    if seconds:
        line["seconds"] = seconds[len(seconds) // 2]
    if read:
        line["tokens"] = round(sum(record["tokens"] for record in read) / len(read))
    return line
