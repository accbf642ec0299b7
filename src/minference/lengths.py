"""Lengths in tokens as people write them, and the pairs that they make. Floor 0."""

from argparse import ArgumentTypeError

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


def length_argument(text: str) -> int:
    """`parse_length` for argparse, which shows the message of this error alone."""
    try:
        return parse_length(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


def causal_pairs(queries: int, context: int) -> float:
    """Pairs of a query and a key that it sees, for the last `queries` tokens of a context."""
    return queries * (context - (queries - 1) / 2)
