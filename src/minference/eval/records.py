"""Results as lines of JSON that outlive a kill: appended whole, read back with care."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minference.eval.packed import CELL, unpack
from minference.log import get_logger

FILE_NAME = "samples.jsonl"
_KEY = ("task", "length", "placement", "split", "seed", "questions", "index", "method")
_ITEM = ("task", "length", "index", "method")
_FIELDS = {
    "run": ("model",),
    "question": (*CELL, "seed", "index", "correct"),
    "prefill": (*CELL, "seed"),
    "cell": (*CELL, "seeds", "correct"),
    "infinitebench": (*_ITEM, "score", "density"),
    "ruler": (*_ITEM, "score", "density"),
    "perplexity": (*_ITEM, "nats", "bits_per_byte", "density"),
}
"""Kinds of records, and what each must hold to be read."""
Record = dict[str, Any]


def key_of(record: Record) -> tuple[Any, ...]:
    """What identifies a result; two results with the same key answer the same question."""
    return tuple(record.get(name) for name in _KEY)


@dataclass
class Records:
    """The results of one folder.

    Attributes:
        path: the JSONL file.
        lines: every record read or appended, in order.
        broken: (line number, why) of lines that could not be read.
    """

    path: Path
    lines: list[Record] = field(default_factory=list)
    broken: list[tuple[int, str]] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path) -> Records:
        """Reads a folder's results for more to be appended.

        A last line that a kill cut off is moved to `samples.jsonl.broken`, so that what follows
        starts on a line of its own; other unreadable lines stay where they are. Both are logged,
        and what they held is asked again.
        """
        path = make_folder(folder) / FILE_NAME
        if not path.exists():
            return cls(path)
        records = _parse(path)
        _warn(records)
        _set_tail_aside(path)
        return records

    @classmethod
    def read(cls, path: Path) -> Records:
        """Reads a file without touching it; lines that `packed.pack` made are taken apart.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: no line of it is a result.
        """
        if not path.is_file():
            raise FileNotFoundError(
                f"no results at {str(path)!r}; name a folder that `minference eval` wrote, or its "
                f"{FILE_NAME}"
            )
        records = _parse(path)
        if not records.lines:
            why = "line {}: {}".format(*records.broken[0]) if records.broken else "it is empty"
            raise ValueError(
                f"{str(path)!r} must hold results of `minference eval`, got none ({why}); name a "
                f"folder that it wrote, or its {FILE_NAME}"
            )
        _warn(records)
        return records

    def of(self, kind: str) -> Iterator[Record]:
        """Records of one kind, as "question"."""
        return (record for record in self.lines if record["record"] == kind)

    def done(self, kind: str = "question") -> set[tuple[Any, ...]]:
        """Keys of the results of one kind."""
        return {key_of(record) for record in self.of(kind)}

    def append(self, records: Iterable[Record]) -> None:
        """Writes records in one piece and waits until they are on the disk."""
        new = list(records)
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in new)
        with self.path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        self.lines += new


def make_folder(folder: Path) -> Path:
    """The folder, made if need be.

    Raises:
        ValueError: it cannot be made, or not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"results cannot be written to {str(folder)!r}: {error.strerror}; name a folder"
        ) from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"results cannot be written to {str(folder)!r}: not yours to write")
    return folder


def _parse(path: Path) -> Records:
    records = Records(path)
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode())
            _check(record)
            records.lines += list(unpack(record)) if record["record"] == "cell" else [record]
        except (ValueError, TypeError, LookupError) as error:
            records.broken.append((number, str(error)))
    return records


def _check(record: object) -> None:
    kind = record.get("record") if isinstance(record, dict) else None
    if kind not in _FIELDS:
        raise ValueError(f"no object with 'record' of {', '.join(_FIELDS)}")
    missing = [name for name in _FIELDS[kind] if name not in record]
    if missing:
        raise ValueError(f"a {kind!r} without {', '.join(missing)}")


def _warn(records: Records) -> None:
    for number, why in records.broken:
        get_logger(__name__).warning(
            "%s, line %d cannot be read (%s); its sample is asked again", records.path, number, why
        )


def _set_tail_aside(path: Path) -> None:
    data = path.read_bytes()
    if not data or data.endswith(b"\n"):
        return
    cut = data.rfind(b"\n") + 1
    try:
        json.loads(data[cut:].decode())
    except ValueError:
        with path.with_name(f"{path.name}.broken").open("ab") as aside:
            aside.write(data[cut:] + b"\n")
        with path.open("r+b") as file:
            file.truncate(cut)
        return
    with path.open("ab") as file:
        file.write(b"\n")
