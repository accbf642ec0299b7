"""Items of a data set under every method: read, kept, gone on with after a kill, summed up.

An item is a text or an example that `read` turns into numbers; `infinitebench` and `pg19` say how.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from minference.eval.facts import check_same, content_hash, run_facts
from minference.eval.records import Record, Records, key_of
from minference.eval.runner import Progress, Subject
from minference.eval.statistics import Difference, paired_difference
from minference.eval.tables import ALL, BASELINE
from minference.methods import Method, Static
from minference.methods.spec import MethodSpec, build_method


@dataclass(frozen=True)
class Item:
    """One thing to read.

    Attributes:
        task: what it belongs to.
        length: tokens it is cut to.
        index: its name within the task.
        content: what `read` gets.
    """

    task: str
    length: int
    index: int | str
    content: Any


Read = Callable[[Subject, Method, Item], Record]


@dataclass(frozen=True)
class Summary:
    """A method on the items of a task and length.

    Attributes:
        value: mean with a 95 % bootstrap interval over items.
        to_dense: difference on the same items, None without a baseline.
        density: share of the causal area that was computed, mean over items and layers.
        seconds: median time of a prefill, None if it was not recorded.
    """

    task: str
    length: int
    method: str
    value: Difference
    to_dense: Difference | None
    density: float
    seconds: float | None


def run_items(
    subject: Subject,
    specs: Sequence[MethodSpec],
    items: Sequence[Item],
    folder: Path,
    read: Read,
    *,
    kind: str,
    command: str = "",
    progress: Progress | None = None,
) -> Records:
    """Reads what the folder does not hold yet; all methods get the same items.

    A static method first reads the last item, so that its lines come from a text of the same kind.

    Args:
        subject: the model.
        specs: the methods.
        items: what to read.
        folder: where `samples.jsonl` lies or will lie.
        read: gives the numbers of an item under a method.
        kind: what the records are called.
        command: what was typed, for the record.
        progress: called with (items done, items in all, what comes next).

    Raises:
        ValueError: two items of one name, the folder holds results of another model, of another
            method of the same label or of another item of the same name, or a method refuses its
            options.
    """
    places = Counter((i.task, i.length, i.index) for i in items)
    for (task, length, index), count in places.items():
        if count > 1:
            raise ValueError(
                f"items of one task and length must have names of their own, got {count} of the "
                f"name {index!r} for {task} at {length} tokens; read them into folders of their own"
            )
    records, facts = Records.open(folder), run_facts(subject, specs, command)
    check_same(records, facts)
    hashes = {(i.task, i.length, i.index): content_hash(i.content) for i in items}
    _check_same_items(records, kind, hashes)
    done = records.done(kind)
    records.append([facts])
    methods: dict[tuple[str, int, str], Method] = {}
    for number, item in enumerate(items):
        if progress:
            progress(number, len(items), f"{item.task} {item.length} {item.index}")
        for spec in specs:
            base = {"task": item.task, "length": item.length, "index": item.index}
            line: Record = {"record": kind, **base, "method": spec.label}
            if key_of(line) in done:
                continue
            place = item.task, item.length, spec.label
            if place not in methods:
                methods[place] = build_method(spec, subject.model.config)
                if isinstance(methods[place], Static):
                    own = [i for i in items if (i.task, i.length) == place[:2]]
                    read(subject, methods[place], own[-1])
            line["content"] = hashes[item.task, item.length, item.index]
            records.append([line | read(subject, methods[place], item)])
    if progress:
        progress(len(items), len(items), "done")
    return records


def summaries(records: Iterable[Mapping[str, Any]], kind: str, value: str) -> list[Summary]:
    """Methods by task and length, in the order of the records; `value` names the number."""
    cells: dict[tuple[str, int], dict[str, dict[tuple[Any, int], Mapping[str, Any]]]] = {}
    for record in records:
        if record["record"] == kind:
            methods = cells.setdefault((record["task"], record["length"]), defaultdict(dict))
            methods[record["method"]][record["index"], 0] = record
    return [
        _summary(cell, method, methods, value)
        for cell, methods in cells.items()
        for method in methods
    ]


def item_table(
    records: Iterable[Mapping[str, Any]],
    kind: str,
    value: str,
    heading: str,
    extra: Mapping[str, Callable[[Summary], str]] | None = None,
) -> str:
    """A markdown row for each task, length and method; intervals are over items.

    Args:
        records: results.
        kind: which of them.
        value: the number to sum up.
        heading: what stands above it.
        extra: more columns before it.
    """
    extra = extra or {}
    names = ["task", "tokens", "items", "method", *extra, heading, "to dense", "density", "prefill"]
    rows = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for found in summaries(records, kind, value):
        cells = [found.task, str(found.length), str(found.value.questions), f"`{found.method}`"]
        cells += [show(found) for show in extra.values()]
        cells += [_interval(found.value), _interval(found.to_dense, sign="+")]
        cells += [_share(found), "-" if found.seconds is None else f"{found.seconds:.2f} s"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _check_same_items(
    records: Records, kind: str, hashes: Mapping[tuple[str, int, int | str], str]
) -> None:
    """Raises ValueError where a folder holds results of an item that now has other content."""
    for record in records.of(kind):
        task, length, index = record["task"], record["length"], record["index"]
        then, now = record.get("content"), hashes.get((task, length, index))
        if then and now and then != now:
            raise ValueError(
                f"{records.path} holds results of item {index!r} of {task} at {length} tokens with "
                "other content than it has now (that of generated items depends on --samples); "
                "name another folder with -o"
            )


def _interval(found: Difference | None, *, sign: str = "") -> str:
    if found is None:
        return "-"
    mean, low, high = (f"{n:{sign}.3f}" for n in (found.mean, found.low, found.high))
    return f"{mean} ({low} to {high})"


def _share(found: Summary) -> str:
    secret = found.method != BASELINE and found.density >= ALL
    return f"{found.density:.3f}{' (dense)' if secret else ''}"


def _summary(
    cell: tuple[str, int],
    method: str,
    methods: Mapping[str, Mapping[tuple[Any, int], Mapping[str, Any]]],
    value: str,
) -> Summary:
    own = methods[method]
    values = {place: float(record[value]) for place, record in own.items()}
    mean = paired_difference(values, dict.fromkeys(values, 0.0))
    assert mean is not None
    base = None
    if method != BASELINE and BASELINE in methods:
        theirs = {place: float(record[value]) for place, record in methods[BASELINE].items()}
        base = paired_difference(values, theirs)
    densities = [share for record in own.values() for share in record["density"]]
    seconds = [record["seconds"] for record in own.values() if "seconds" in record]
    density = sum(densities) / len(densities)
    return Summary(*cell, method, mean, base, density, median(seconds) if seconds else None)
