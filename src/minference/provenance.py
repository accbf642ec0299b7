"""Where a table of head patterns came from. Floor 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from minference.errors import unknown_name

_TEXT = ("model", "objective", "basis", "date", "version")
_LISTS = ("aliases", "architectures")
_NUMBERS: Mapping[str, tuple[type, ...]] = {"tokens": (int,), "recall": (int, float)}


@dataclass(frozen=True, slots=True)
class Provenance:
    """What is known about a table; None where that is not known.

    Attributes:
        model: hub id of the weights that were searched.
        aliases: other ids with the same attention heads.
        architectures: `model_type` values of transformers that the table fits.
        tokens: length of the prompt that was searched on.
        objective: what the search compared.
        basis: how the table came about, in words.
        recall: median over heads of the attention mass kept, in [0, 1], as recorded.
        date: ISO day of the search.
        version: program and version that searched.
    """

    model: str | None = None
    aliases: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    tokens: int | None = None
    objective: str | None = None
    basis: str | None = None
    recall: float | None = None
    date: str | None = None
    version: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """What is known, as JSON-ready values."""
        return {name: value for name, value in asdict(self).items() if value not in (None, ())}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Provenance:
        """Reads what `to_dict` wrote.

        Raises:
            ValueError: an unknown field.
            TypeError: a value of the wrong type.
        """
        for name, value in data.items():
            if name not in (*_TEXT, *_LISTS, *_NUMBERS):
                raise unknown_name("provenance field", name, (*_TEXT, *_LISTS, *_NUMBERS))
            if value is not None and not _fits(name, value):
                raise TypeError(f"provenance field {name!r} has the wrong type: {value!r:.60}")
        lists = {name: tuple(data.get(name) or ()) for name in _LISTS}
        return cls(**{**data, **lists})


def _fits(name: str, value: object) -> bool:
    if name in _LISTS:
        return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
    if name in _NUMBERS:
        return isinstance(value, _NUMBERS[name]) and not isinstance(value, bool)
    return isinstance(value, str)
