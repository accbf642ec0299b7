"""Lengths as people write them."""

from argparse import ArgumentTypeError

import pytest

from minference.lengths import length_argument, parse_length


@pytest.mark.parametrize(
    ("text", "tokens"), [("500", 500), ("16k", 16384), ("128K", 131_072), ("1m", 1 << 20)]
)
def test_lengths(text: str, tokens: int) -> None:
    assert parse_length(text) == length_argument(text) == tokens


@pytest.mark.parametrize("text", ["", "k", "0", "-4", "4.5k", "four"])
def test_bad_lengths(text: str) -> None:
    with pytest.raises(ValueError, match="16384, 16k or 1m"):
        parse_length(text)
    with pytest.raises(ArgumentTypeError, match="16384, 16k or 1m"):
        length_argument(text)
