"""The example of the user's call, as it stands."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[3] / "examples" / "run_hf.py"


@pytest.mark.slow
def test_the_example_finds_the_fact(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("run_hf", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    answer = example.main(["--seed", "1"])
    expected = re.search(r"expected '(.+)'", capsys.readouterr().out)
    assert expected is not None
    assert answer == expected[1]
