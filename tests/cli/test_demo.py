"""`minference demo` where what it needs is missing; the page itself is tested in tests/demo."""

import sys

import pytest
from typer.testing import CliRunner

from minference.cli import app
from minference.errors import MissingDependencyError


def test_the_missing_extra_is_named_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    done = CliRunner().invoke(app, ["demo", "no/such-model"])
    assert isinstance(done.exception, MissingDependencyError)
    assert "pip install 'minference[demo]'" in str(done.exception)
