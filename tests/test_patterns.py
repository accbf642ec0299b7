"""Patterns: validation, dictionaries, scaling."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minference.patterns import (
    PATTERN_KINDS,
    AShape,
    BlockSparse,
    Dense,
    Pattern,
    TriShape,
    VerticalSlash,
    pattern_from_dict,
)

EXAMPLES: list[Pattern] = [
    Dense(),
    AShape(128, 3968),
    VerticalSlash(1000, 6096),
    BlockSparse(100, 128),
    TriShape(8, 512, 128),
]


@pytest.mark.parametrize("pattern", EXAMPLES, ids=lambda p: p.kind)
def test_dict_round_trip(pattern: Pattern) -> None:
    assert pattern_from_dict(pattern.to_dict()) == pattern
    assert PATTERN_KINDS[pattern.kind] is type(pattern)


@pytest.mark.parametrize("pattern", EXAMPLES, ids=lambda p: p.kind)
def test_patterns_are_frozen_and_hashable(pattern: Pattern) -> None:
    assert len({pattern, dataclasses.replace(pattern)}) == 1
    with pytest.raises((dataclasses.FrozenInstanceError, TypeError, AttributeError)):
        pattern.kind = "other"  # type: ignore[misc]


def test_shorter_contexts_get_budgets_in_proportion() -> None:
    table = VerticalSlash(1000, 6096)
    assert table.served(65_536) == VerticalSlash(500, 3048)
    assert table.served(131_072) is table.served(1 << 20) is table
    assert table.served(4096, budget_length=8192) == VerticalSlash(500, 3048)


def test_equal_numbers_of_different_kinds_differ() -> None:
    assert AShape(10, 20) != VerticalSlash(10, 20)


@pytest.mark.parametrize("value", [True, 1.0, math.nan, math.inf, "3", None, np.float32(2)])
def test_a_budget_that_is_no_integer_raises(value: Any) -> None:
    with pytest.raises(TypeError, match=r"VerticalSlash\.slash must be an int, got"):
        VerticalSlash(1, value)


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (VerticalSlash, (-1, 5), r"VerticalSlash\.vertical must be between 0"),
        (VerticalSlash, (5, 0), r"VerticalSlash\.slash must be between 1"),
        (VerticalSlash, (5, 2**31), r"VerticalSlash\.slash .* got 2147483648"),
        (AShape, (-1, 5), r"AShape\.sink must be between 0"),
        (AShape, (5, 0), r"AShape\.local must be between 1"),
        (BlockSparse, (0,), r"BlockSparse\.topk must be between 1"),
        (BlockSparse, (1, 32), r"BlockSparse\.block must be between 64"),
        (BlockSparse, (1, 96), r"BlockSparse\.block must be a multiple of 64"),
        (TriShape, (1, 1, -1), r"TriShape\.last must be between 0"),
    ],
)
def test_a_budget_out_of_range_raises(
    cls: type[Pattern], fields: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cls(*fields)


def test_numpy_integers_become_python_integers() -> None:
    assert type(VerticalSlash(np.int64(3), np.int32(4)).slash) is int


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"kind": "vertical_slsh"}, ValueError, "did you mean 'vertical_slash'"),
        ({"vertical": 1}, ValueError, "valid names are a_shape, block_sparse, dense"),
        ({"kind": ["a_shape"]}, ValueError, "unknown pattern kind"),
        ({"kind": "a_shape", "sink": 1}, ValueError, "takes the fields sink, local; got sink"),
        ({"kind": "dense", "x": 1}, ValueError, "takes the fields no fields; got x"),
        ([1], TypeError, "must be a mapping"),
    ],
)
def test_a_malformed_dictionary_raises(data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pattern_from_dict(data)


def test_scaling_touches_only_length_like_budgets() -> None:
    assert VerticalSlash(1000, 6096).scaled(0.5) == VerticalSlash(500, 3048)
    assert AShape(128, 4000).scaled(2) == AShape(128, 8000)
    assert TriShape(8, 512, 128).scaled(0.25) == TriShape(8, 128, 128)
    assert BlockSparse(100, 128).scaled(0.1) == BlockSparse(10, 128)
    assert Dense().scaled(0.5) == Dense()


@pytest.mark.parametrize("ratio", [0, -1, math.nan, math.inf])
def test_a_ratio_out_of_range_raises(ratio: float) -> None:
    with pytest.raises(ValueError, match="ratio must be finite and above 0"):
        VerticalSlash().scaled(ratio)


@pytest.mark.parametrize("ratio", [True, "2", None])
def test_a_ratio_that_is_no_number_raises(ratio: Any) -> None:
    with pytest.raises(TypeError, match="ratio must be a number"):
        VerticalSlash().scaled(ratio)


@given(
    st.integers(0, 2**31 - 1),
    st.integers(1, 2**31 - 1),
    st.floats(1e-9, 1e9, allow_nan=False),
)
def test_scaling_always_gives_a_legal_pattern(vertical: int, slash: int, ratio: float) -> None:
    scaled = VerticalSlash(vertical, slash).scaled(ratio)
    assert scaled.vertical >= 0
    assert scaled.slash >= 1
