"""Accuracy, density and times of the methods on models/needle: measure, pack, write the table.

python benchmarks/eval_table.py run --lengths 32k --placement spread --folder out/eval_table
python benchmarks/eval_table.py pack out/eval_table --out benchmarks/results/eval_h200.jsonl
python benchmarks/eval_table.py table benchmarks/results/eval_h200.jsonl \
    --times benchmarks/results/peer_times_h200.jsonl --write docs/evaluation.md
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from minference.bench.peers import MethodTime, Times, read_times
from minference.bench.records import environment
from minference.eval.packed import CELL, pack
from minference.eval.plan import Cell, make_cells, resolve_tasks
from minference.eval.records import Records
from minference.eval.runner import Subject, default_workers, run_cells
from minference.eval.statistics import (
    Answers,
    CellKey,
    answers_by_cell,
    difference_to,
    scores,
)
from minference.eval.tables import REPORTED
from minference.integrations.transformers.load import load
from minference.json_files import read_json_lines
from minference.lengths import length_argument, parse_length
from minference.methods.spec import parse_methods

METHODS = (
    "dense,minference:budget_length=none,selection=lines,minference:budget_length=none,minference,"
    "a_shape,tri_shape,dilated1,static,static:vertical=250,slash=1524,"
    "grouped,xattention:stride=16,xattention:stride=8,flexprefill"
)
"""MInference with published budgets, as published and by blocks, then scaled to the length (a
quarter at 32K); static lines with the same two budgets."""
PROMPTS = {"spread": 25, "end": 200, "cached": 84}
QUESTIONS = {"spread": 12, "end": 1, "cached": 12}
WHERE = {
    "spread": "over the last thousand tokens",
    "end": "at the end of the prompt",
    "cached": "each behind the cached prompt",
}
MARK = "<!-- eval table -->"
PACKED = "packed.jsonl"
_DENSE = 0.995


class _TimeUp(Exception):
    pass


def main() -> None:
    """One of the three commands."""
    given = argparse.ArgumentParser(description=__doc__)
    commands = given.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="ask; goes on where the folder's results stop")
    run.add_argument("--model", default="models/needle")
    run.add_argument("--tasks", default="retrieval")
    run.add_argument("--methods", default=METHODS)
    run.add_argument("--lengths", type=length_argument, nargs="+", default=[16_384, 32_768])
    run.add_argument("--placement", choices=list(PROMPTS), default="spread")
    run.add_argument("--split", choices=["heldout", "dev"], default="heldout")
    run.add_argument("--prompts", type=int, help="of a cell; 25 spread, 200 at the end, 84 cached")
    run.add_argument("--questions", type=int, help="for each prompt; 1 at the end, 12 otherwise")
    run.add_argument("--seconds", type=float, default=1e9, help="stop asking after that long")
    run.add_argument("--workers", type=int, help="processes that write prompts")
    run.add_argument("--untimed", action="store_true", help="no times: the GPU serves others too")
    run.add_argument("--folder", type=Path, required=True)
    packing = commands.add_parser("pack", help="append folders' results to a file to commit")
    packing.add_argument("folders", type=Path, nargs="+")
    packing.add_argument("--out", type=Path, required=True)
    packing.add_argument("--least", type=int, default=200, help="questions of a cell to keep it")
    table = commands.add_parser("table", help="print the table, or write it into a page")
    table.add_argument("files", type=Path, nargs="+")
    table.add_argument("--write", type=Path, help=f"page with two lines {MARK}")
    table.add_argument("--times", type=Path, nargs="*", default=[], help="of peer_times.py")
    table.add_argument("--only", metavar="LENGTH-PLACEMENT", help="one table: 32k-spread")
    options = given.parse_args()
    {"run": measure, "pack": append_packed, "table": show}[options.command](options)


def measure(options: argparse.Namespace) -> None:
    """Asks every method the same questions and packs what came of it."""
    subject = Subject(options.model, *load(options.model))
    device = subject.model.device.type
    stop = time.monotonic() + options.seconds
    began = time.monotonic()

    def progress(done: int, total: int, what: str) -> None:
        if done % 25 == 0 or done == total:
            print(f"{time.monotonic() - began:6.1f} s  {done}/{total}  {what}", flush=True)
        if time.monotonic() > stop:
            raise _TimeUp

    finished = True
    try:
        run_cells(
            subject,
            parse_methods(options.methods),
            cells_of(options),
            options.folder,
            command=" ".join(["eval_table.py", *sys.argv[1:]]),
            progress=progress,
            workers=default_workers(device) if options.workers is None else options.workers,
        )
    except _TimeUp:
        finished = False
    records = Records.open(options.folder)
    records.append([{"record": "run", "model": options.model, **environment()}])
    packed = pack(records.lines)
    if options.untimed:
        packed = [{key: line[key] for key in line if key != "seconds"} for line in packed]
    write_lines(options.folder / PACKED, packed)
    print(tables(Records.read(options.folder / PACKED).lines))
    if device == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    if not finished:
        print(f"stopped after {options.seconds:.0f} s; the same command goes on")


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """The cells of a run: so many prompts with so many questions each."""
    prompts = options.prompts or PROMPTS[options.placement]
    questions = options.questions or QUESTIONS[options.placement]
    return list(
        make_cells(
            resolve_tasks(options.tasks.split(",")),
            options.lengths,
            samples=prompts * questions,
            placement=options.placement,
            split=options.split,
            questions=questions,
        )
    )


def append_packed(options: argparse.Namespace) -> None:
    """Gathers folders in one file; a cell and method that is there already is replaced, one with
    too few questions left out."""
    files = [folder / PACKED for folder in options.folders]
    for file in files:
        if not file.is_file():
            raise SystemExit(f"no {file}; it is written when `run` into that folder ends")
    if options.out.exists():
        files.insert(0, options.out)
    known = [line for file in files for line in read_json_lines(file)]
    latest = {_key(line): line for line in known if _questions(line) >= options.least}
    write_lines(options.out, latest.values())
    print(f"{options.out}: {len(latest)} lines, {options.out.stat().st_size} bytes")


def _key(line: dict[str, Any]) -> tuple[Any, ...]:
    if line["record"] == "run":
        return line.get("date"), line.get("command"), line.get("device")
    return tuple(line[name] for name in CELL)


def _questions(line: dict[str, Any]) -> float:
    return sum(map(line["correct"].count, "01")) if line["record"] == "cell" else math.inf


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Lines of JSON."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def show(options: argparse.Namespace) -> None:
    """Prints the tables, or puts them between the marks of a page."""
    lines = [line for path in options.files for line in Records.read(path).lines]
    text = tables(lines, options.only, read_times(options.times))
    if options.write is None:
        print(text)
        return
    page = options.write.read_text(encoding="utf-8")
    before, _, after = page.partition(MARK + "\n")
    _, mark, rest = after.partition(MARK)
    if not mark:
        raise SystemExit(f"{options.write} has no two lines {MARK}")
    page = f"{before}{MARK}\n\n{text}\n\n{MARK}{rest}"
    options.write.write_text(page, encoding="utf-8")


def tables(lines: list[dict[str, Any]], only: str | None = None, times: Times | None = None) -> str:
    """A table for each length and placement: a row a method, a column a task; and what attention
    takes, where a method was timed at that length."""
    shapes = {(r["length"], r["placement"], r["split"]) for r in lines if r["record"] == "question"}
    if only is not None:
        length, _, placement = only.partition("-")
        shapes = {shape for shape in shapes if shape[:2] == (parse_length(length), placement)}
    return "\n\n".join(_table(lines, *shape, times or {}) for shape in sorted(shapes))


def _either(numbers: list[int]) -> str:
    """As in: 1, 2 or 3."""
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last


def _table(
    lines: list[dict[str, Any]], length: int, placement: str, split: str, times: Times
) -> str:
    shape = length, placement, split
    own = [r for r in lines if tuple(map(r.get, ("length", "placement", "split"))) == shape]
    found, answers = scores(own), answers_by_cell(own)
    tasks = [cell[0] for cell in found]
    methods = list(dict.fromkeys(method for cell in found.values() for method in cell))
    asked = [score for cell in found.values() for score in cell.values()]
    questions = sorted({score.total for score in asked})
    prompts = sorted({score.prompts for score in asked})
    where = WHERE[placement] + ("" if split == REPORTED else f", {split} seeds")
    head = ["method", *(task.replace("_", " ") for task in tasks)]
    timed = any(score.seconds is not None for score in asked)
    head += ["all, to dense (95 %)", "density", "recall", *(["prefill"] if timed else [])]
    layers = {method: times[length, method] for method in methods if (length, method) in times}
    head += ["attention of a layer", "speed-up"] if layers else []
    rows = [
        f"{length // 1024}K tokens, questions {where}; a cell is "
        f"{_either(questions)} questions on {_either(prompts)} prompts",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    for method in methods:
        cells = {cell[0]: by[method] for cell, by in found.items() if method in by}
        row = [f"{cells[t].accuracy:.3f}" if t in cells else "-" for t in tasks]
        row.append(_to_dense(answers, method))
        density = _mean(score.density for score in cells.values())
        secret = method != "dense" and density is not None and density >= _DENSE
        row.append(_number(density) + (" (dense)" if secret else ""))
        row.append(_number(_mean(score.recall for score in cells.values())))
        if timed:
            seconds = _mean(score.seconds for score in cells.values())
            row.append("-" if seconds is None else f"{1000 * seconds:.0f} ms")
        if layers:
            time = layers.get(method)
            row += ["-"] * 2 if time is None else _layer(time)
        rows.append(f"| `{method}` | {' | '.join(row)} |")
    return "\n".join(rows)


def _to_dense(answers: dict[CellKey, dict[str, Answers]], method: str) -> str:
    """The difference over all tasks."""
    if method == "dense":
        return "-"
    gap = difference_to(answers, method)
    return "-" if gap is None else f"{gap.mean:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})"


def _layer(time: MethodTime) -> list[str]:
    return [f"{time.milliseconds:.2f} ms", f"{time.speedup:.2f}"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


if __name__ == "__main__":
    main()
