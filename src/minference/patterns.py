"""The sparse pattern of one attention head: frozen dataclasses of plain integers. Floor 0.

Lengths count tokens. A pattern says how much may be kept; which columns, diagonals or blocks are
kept is decided for each prompt by a method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any, ClassVar, Self, TypeAlias

from minference.errors import unknown_name

KEY_BLOCK = 64
BUDGET_LENGTH = 131_072
"""Context length, in tokens, that the budgets of published and searched tables are meant for."""
_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class _Base:
    kind: ClassVar[str]
    _least: ClassVar[Mapping[str, int]] = {}
    _scales: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Checks each budget, and turns foreign integers into Python's."""
        for field, least in self._least.items():
            value = _checked_int(f"{type(self).__name__}.{field}", getattr(self, field), least)
            object.__setattr__(self, field, value)

    def to_dict(self) -> dict[str, Any]:
        """The pattern as JSON-ready values, `kind` first."""
        return {"kind": self.kind, **asdict(self)}

    def scaled(self, ratio: float) -> Self:
        """The same pattern with its length-like budgets multiplied by `ratio`, rounded.

        Verticals, slashes, local windows and block counts scale; sinks, last rows and block
        sizes do not. A budget never falls below the least legal value.
        """
        if isinstance(ratio, bool) or not isinstance(ratio, Real):
            raise TypeError(f"ratio must be a number, got {type(ratio).__name__} {ratio!r}")
        if not math.isfinite(ratio) or ratio <= 0:
            raise ValueError(f"ratio must be finite and above 0, got {ratio!r}")
        fields = asdict(self)
        for field in self._scales:
            fields[field] = max(self._least[field], min(_MAX, round(fields[field] * float(ratio))))
        return type(self)(**fields)

    def served(self, length: int, budget_length: int = BUDGET_LENGTH) -> Self:
        """The pattern that a context of `length` tokens gets: budgets in proportion where it is
        shorter than what they are meant for."""
        return self if length >= budget_length else self.scaled(length / budget_length)


@dataclass(frozen=True, slots=True)
class Dense(_Base):
    """Causal attention to every key."""

    kind: ClassVar[str] = "dense"


@dataclass(frozen=True, slots=True)
class AShape(_Base):
    """The first `sink` keys and the last `local` keys of every row, the row's own included."""

    sink: int = 128
    local: int = 3968
    kind: ClassVar[str] = "a_shape"
    _least: ClassVar[Mapping[str, int]] = {"sink": 0, "local": 1}
    _scales: ClassVar[tuple[str, ...]] = ("local",)


@dataclass(frozen=True, slots=True)
class VerticalSlash(_Base):
    """The heaviest `vertical` key columns and the heaviest `slash` diagonals of the prompt.

    Sink columns and the local band count against the budgets (arXiv 2407.02490, section 3).
    """

    vertical: int = 1000
    slash: int = 6096
    kind: ClassVar[str] = "vertical_slash"
    _least: ClassVar[Mapping[str, int]] = {"vertical": 0, "slash": 1}
    _scales: ClassVar[tuple[str, ...]] = ("vertical", "slash")


@dataclass(frozen=True, slots=True)
class BlockSparse(_Base):
    """For each block of `block` rows, the `topk` key blocks that score highest when pooled."""

    topk: int = 100
    block: int = KEY_BLOCK
    kind: ClassVar[str] = "block_sparse"
    _least: ClassVar[Mapping[str, int]] = {"topk": 1, "block": KEY_BLOCK}
    _scales: ClassVar[tuple[str, ...]] = ("topk",)

    def __post_init__(self) -> None:
        """Checks the budgets, and that a block is a whole number of kernel blocks."""
        _Base.__post_init__(self)
        if self.block % KEY_BLOCK:
            raise ValueError(
                f"BlockSparse.block must be a multiple of {KEY_BLOCK}, the kernels' key block, "
                f"got {self.block}"
            )


@dataclass(frozen=True, slots=True)
class TriShape(_Base):
    """An A-shape whose `last` final rows attend to every key (arXiv 2412.10319)."""

    sink: int = 128
    local: int = 3968
    last: int = 100
    kind: ClassVar[str] = "tri_shape"
    _least: ClassVar[Mapping[str, int]] = {"sink": 0, "local": 1, "last": 0}
    _scales: ClassVar[tuple[str, ...]] = ("local",)


Pattern: TypeAlias = Dense | AShape | VerticalSlash | BlockSparse | TriShape

PATTERN_KINDS: Mapping[str, type[Pattern]] = {
    cls.kind: cls for cls in (Dense, AShape, VerticalSlash, BlockSparse, TriShape)
}


def pattern_from_dict(data: Mapping[str, Any]) -> Pattern:
    """Reads what `to_dict` wrote.

    Raises:
        ValueError: an unknown kind or field, a missing field, or a budget out of range.
        TypeError: not a mapping, or a budget that is no integer.
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"a pattern must be a mapping with 'kind', got {type(data).__name__}")
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in PATTERN_KINDS:
        raise unknown_name("pattern kind", kind, PATTERN_KINDS)
    cls = PATTERN_KINDS[kind]
    given = {str(key): value for key, value in data.items() if key != "kind"}
    if given.keys() != cls._least.keys():
        expected = ", ".join(cls._least) or "no fields"
        got = ", ".join(given) or "none"
        raise ValueError(f"pattern {kind!r} takes the fields {expected}; got {got}")
    return cls(**given)


def _checked_int(what: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{what} must be an int, got {type(value).__name__} {value!r}")
    number = int(value)
    if not least <= number <= _MAX:
        raise ValueError(f"{what} must be between {least} and {_MAX}, got {number}")
    return number
