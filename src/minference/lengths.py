"""Lengths in tokens: as people write them, and as a model bounds them. Floor 0."""

from __future__ import annotations

from typing import Any

_UNITS = {"k": 1 << 10, "m": 1 << 20}


def parse_length(text: str) -> int:
    """A number of tokens: `4096`, `4k` (4096), `1m` (2 ** 20).

    Raises:
        ValueError: anything else, zero included.
    """
    lowered = text.strip().lower()
    unit = _UNITS.get(lowered[-1:], 1)
    digits = lowered if unit == 1 else lowered[:-1]
    if not (digits.isascii() and digits.isdigit() and int(digits)):
        raise ValueError(f"a length must look like 16384, 16k or 1m, got {text!r}")
    return int(digits) * unit


def token_limit(config: Any) -> int | None:  # noqa: ANN401
    """Tokens that a model of this configuration takes; None where it does not say."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
