"""The patterns of all heads of a model, where they came from, and how they are found. Floor 0.

Tables are found by hub id, by an explicit file, or by architecture and shape; the spelling of a
local path decides nothing.
"""

from __future__ import annotations

import functools
import json
import math
import os
import string
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from minference import upstream_json
from minference.errors import PatternFileError, unknown_name
from minference.json_files import line_json, read_json, write_text
from minference.patterns import Pattern, VerticalSlash, pattern_from_dict
from minference.provenance import Provenance

FORMAT = "minference.head_patterns/1"
FILE_NAME = "head_patterns.json"
FILE_NAMES = (FILE_NAME, "patterns.json")
"""Names of a table in a folder: as it saves itself, and as the documents write it."""
DEFAULT_PATTERN = VerticalSlash(1000, 6096)
_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class HeadPatterns:
    """One pattern for each `[layer][head]`, with provenance and, where known, a score a head."""

    patterns: upstream_json.Rows
    provenance: Provenance = field(default_factory=Provenance)
    scores: upstream_json.Scores | None = None

    def __post_init__(self) -> None:
        """Freezes nested lists, and checks that the table is a full rectangle."""
        object.__setattr__(self, "patterns", tuple(tuple(row) for row in self.patterns))
        if not self.patterns or not self.patterns[0]:
            raise ValueError("head patterns need at least one layer and one head")
        for layer, row in enumerate(self.patterns):
            if len(row) != self.heads:
                raise ValueError(f"layer {layer} has {len(row)} heads, layer 0 has {self.heads}")
            for head, pattern in enumerate(row):
                if not isinstance(pattern, Pattern):
                    raise TypeError(
                        f"layer {layer}, head {head}: expected a pattern of minference.patterns, "
                        f"got {type(pattern).__name__}"
                    )
        if self.scores is not None:
            object.__setattr__(self, "scores", _checked_scores(self.scores, self.shape))

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.patterns)

    @property
    def heads(self) -> int:
        """Number of query heads in each layer."""
        return len(self.patterns[0])

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and heads."""
        return self.layers, self.heads

    def __getitem__(self, layer: int) -> tuple[Pattern, ...]:
        """The patterns of one layer."""
        return self.patterns[layer]

    def scaled(self, ratio: float) -> HeadPatterns:
        """Every pattern `scaled` by the ratio; scores belong to the old budgets and are dropped."""
        rows = tuple(tuple(pattern.scaled(ratio) for pattern in row) for row in self.patterns)
        return HeadPatterns(rows, replace(self.provenance, recall=None))

    def counts(self) -> Counter[Pattern]:
        """How many heads use each pattern."""
        return Counter(pattern for row in self.patterns for pattern in row)

    def to_dict(self) -> dict[str, Any]:
        """The table in this library's schema: one letter a head, one string a layer."""
        ranked = [pattern for pattern, _ in self.counts().most_common()]
        letters = {pattern: _letter(rank) for rank, pattern in enumerate(ranked)}
        data: dict[str, Any] = {
            "format": FORMAT,
            "layers": self.layers,
            "heads": self.heads,
            "provenance": self.provenance.to_dict(),
            "legend": {letter: pattern.to_dict() for pattern, letter in letters.items()},
            "rows": ["".join(letters[pattern] for pattern in row) for row in self.patterns],
        }
        if self.scores is not None:
            data["scores"] = self.scores
        return data

    @classmethod
    def from_dict(cls, data: object) -> HeadPatterns:
        """Reads decoded JSON, of this library's schema or of the published layout.

        Raises:
            PatternFileError: neither layout; the message names the place.
        """
        if isinstance(data, list):
            rows, scores = upstream_json.parse(data)
            return cls(rows, scores=scores)
        try:
            return _from_schema(data)
        except PatternFileError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            detail = f"no field {error}" if isinstance(error, KeyError) else error
            raise PatternFileError(str(detail)) from error

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> HeadPatterns:
        """Reads a file of either layout, or the one of `FILE_NAMES` in a folder.

        Raises:
            FileNotFoundError: there is no such file.
            PatternFileError: the file does not hold head patterns.
        """
        path = Path(path)
        if path.is_dir():
            path = next(iter(tables_in(path)), path / FILE_NAME)
        data = read_json(path)
        try:
            return cls.from_dict(data)
        except PatternFileError as error:
            raise PatternFileError(f"{path}: {error}") from error

    @classmethod
    def from_pretrained(cls, id_or_path: str | os.PathLike[str]) -> HeadPatterns:
        """Finds a table by hub id or alias, or reads a file or a folder that holds one.

        Raises:
            ValueError: a name that is neither; the message says how to get patterns.
            PatternFileError: the file does not hold head patterns.
        """
        if isinstance(id_or_path, str) and id_or_path in _published():
            return _published()[id_or_path]
        path = Path(id_or_path)
        if path.is_file() or tables_in(path):
            return cls.from_file(path)
        raise ValueError(
            f"no head patterns for {str(id_or_path)!r}: it is no file, no folder with "
            f"{' or '.join(FILE_NAMES)}, and none of the ids of get_support_models(). Name the "
            "model that the weights come from, run `minference search`, or use "
            "default_patterns(layers, heads)"
        )

    @classmethod
    def for_shape(cls, layers: int, heads: int, architecture: str | None = None) -> HeadPatterns:
        """The one published table of this shape and architecture, else the default patterns.

        Several tables of the same shape are no better than a guess, so they give the default; a
        table whose recorded recall is below a half is never chosen this way.

        Args:
            layers: number of layers.
            heads: number of query heads.
            architecture: `model_type` of a transformers config, such as "qwen2".
        """
        tables = {
            table.provenance.model: table
            for table in _published().values()
            if table.shape == (layers, heads)
            and (architecture is None or architecture in table.provenance.architectures)
            and (table.provenance.recall is None or table.provenance.recall >= 0.5)
        }
        return next(iter(tables.values())) if len(tables) == 1 else default_patterns(layers, heads)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the table in this library's schema; a reader sees the old file or the new one.

        Args:
            path: a file, or an existing folder, which gets `head_patterns.json`.

        Returns:
            The file written.
        """
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        write_text(path, line_json(self.to_dict()))
        return path

    @classmethod
    def from_upstream_json(cls, path: str | os.PathLike[str]) -> HeadPatterns:
        """Reads a file of the published layout (microsoft/MInference's configs).

        Raises:
            FileNotFoundError: there is no such file.
            PatternFileError: the file does not follow the layout.
        """
        data = read_json(Path(path))
        try:
            rows, scores = upstream_json.parse(data)
        except PatternFileError as error:
            raise PatternFileError(f"{path}: {error}") from error
        return cls(rows, scores=scores)

    def to_upstream_json(self, path: str | os.PathLike[str]) -> Path:
        """Writes the published layout, without provenance, which it has no place for.

        Raises:
            UnsupportedError: a pattern that the layout has no name for.
        """
        data = upstream_json.dump(self.patterns, self.scores)
        write_text(Path(path), json.dumps(data) + "\n")
        return Path(path)


def default_patterns(layers: int, heads: int, pattern: Pattern = DEFAULT_PATTERN) -> HeadPatterns:
    """The same pattern for every head: what a model without a table gets."""
    if layers < 1 or heads < 1:
        raise ValueError(f"layers and heads must be at least 1, got {layers} and {heads}")
    return HeadPatterns(((pattern,) * heads,) * layers, Provenance(basis="default, not searched"))


def get_support_models() -> list[str]:
    """Every hub id, aliases included, that a published table is shipped for, sorted."""
    return sorted(_published())


@functools.cache
def _published() -> Mapping[str, HeadPatterns]:
    tables = {}
    folder = files("minference") / "data" / "head_patterns"
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".json"):
            table = HeadPatterns.from_dict(json.loads(entry.read_text(encoding="utf-8")))
            for name in (table.provenance.model, *table.provenance.aliases):
                tables[name] = table
    return tables


def _from_schema(data: object) -> HeadPatterns:
    if not isinstance(data, dict):
        raise PatternFileError(f"expected an object or a list, got {type(data).__name__}")
    if data.get("format") != FORMAT:
        raise PatternFileError(f"expected the format {FORMAT!r}, got {data.get('format')!r}")
    allowed = {"format", "layers", "heads", "provenance", "legend", "rows", "scores"}
    for name in data.keys() - allowed:
        raise unknown_name("field", name, allowed)
    for name, kind in (("legend", dict), ("rows", list), ("provenance", dict)):
        if not isinstance(data.get(name, kind()), kind):
            raise PatternFileError(f"{name} must be a {kind.__name__}, got {data[name]!r:.40}")
    if not all(isinstance(row, str) for row in data["rows"]):
        raise PatternFileError(f"rows must hold strings, got {data['rows']!r:.40}")
    legend = {letter: pattern_from_dict(entry) for letter, entry in data["legend"].items()}
    shape = (len(data["rows"]), *sorted({len(row) for row in data["rows"]}))
    if shape != (data["layers"], data["heads"]):
        raise PatternFileError(
            f"rows must hold {data['layers']} strings of {data['heads']} letters; "
            f"got {shape[0]} of lengths {list(shape[1:])}"
        )
    for layer, row in enumerate(data["rows"]):
        for letter in row:
            if letter not in legend:
                raise PatternFileError(f"row {layer}: letter {letter!r} is not in the legend")
    rows = tuple(tuple(legend[letter] for letter in row) for row in data["rows"])
    provenance = Provenance.from_dict(data.get("provenance", {}))
    return HeadPatterns(rows, provenance, data.get("scores"))


def _checked_scores(
    scores: Iterable[Iterable[float | None]], shape: tuple[int, int]
) -> upstream_json.Scores:
    nested = isinstance(scores, list | tuple) and all(isinstance(r, list | tuple) for r in scores)
    if not nested:
        raise TypeError(f"scores must be a list of rows, got {scores!r:.40}")
    checked = tuple(tuple(row) for row in scores)
    if (len(checked), *{len(row) for row in checked}) != shape:
        raise ValueError(f"scores must have {shape[0]} rows of {shape[1]}, as the patterns have")
    for score in (score for row in checked for score in row):
        plain = isinstance(score, int | float) and not isinstance(score, bool)
        if score is not None and not (plain and math.isfinite(score)):
            raise ValueError(f"a score must be a finite number or None, got {score!r}")
    return checked


def tables_in(folder: str | os.PathLike[str]) -> list[Path]:
    """The pattern files of a folder, by the names that they go by."""
    return [path for name in FILE_NAMES if (path := Path(folder) / name).is_file()]


def _letter(rank: int) -> str:
    # past letters and digits, one character a head still: a run of plain letters of the BMP
    return _LETTERS[rank] if rank < len(_LETTERS) else chr(0x4E00 + rank - len(_LETTERS))
