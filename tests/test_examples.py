"""The examples run as they are written."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_kernel_only_finds_what_was_planted() -> None:
    main = runpy.run_path(str(EXAMPLES / "kernel_only.py"))["main"]
    errors = main([])
    assert errors["vertical-slash"] < 0.5 * errors["A-shape"]


def test_custom_method_serves_a_model() -> None:
    pytest.importorskip("transformers")
    density = runpy.run_path(str(EXAMPLES / "custom_method.py"))["main"]()
    assert 0.05 < density < 0.5
