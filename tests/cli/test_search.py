"""The search command, from a text to a file that `inspect` reads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from minference.cli import app, search
from minference.head_patterns import HeadPatterns
from minference.testing import tiny_model

RUNNER = CliRunner()


class Bytes:
    """A tokenizer of bytes."""

    def __call__(self, text: str, return_tensors: str) -> Any:
        ids = torch.tensor([[3 + byte for byte in text.encode()]])
        return type("Encoded", (), {"input_ids": ids})()


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "load", lambda name: (tiny_model(), Bytes()))


def test_a_search_writes_a_table(tmp_path: Path) -> None:
    text, out = tmp_path / "prompt.txt", tmp_path / "new" / "patterns.json"
    text.write_text("one line after another, and so on. " * 20)
    arguments = ["search", "tiny", "-o", str(out), "--text", str(text), "--rows", "8"]
    done = RUNNER.invoke(app, [*arguments, "--name", "some/model", "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert sum(result["heads"].values()) == 16
    assert result["lengths"] == [700]
    table = HeadPatterns.from_file(out)
    assert table.shape == (4, 4)
    assert table.provenance.model == "some/model"
    assert [path.name for path in out.parent.iterdir()] == ["patterns.json"]
    shown = RUNNER.invoke(app, ["inspect", str(out)])
    assert "4 layers, 4 heads" in shown.stdout


def test_generated_prompts_and_the_report(tmp_path: Path) -> None:
    out = tmp_path / "patterns.json"
    options = ["--tasks", "key_value", "--lengths", "1k", "--rows", "4", "--objective", "mass"]
    done = RUNNER.invoke(app, ["search", "tiny", "-o", str(out), *options])
    assert done.exit_code == 0, done.output
    assert "mass score" in done.stdout
    assert "at 128K" in done.stdout


def test_bad_paths_are_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(name: str) -> None:
        raise AssertionError(name)

    monkeypatch.setattr(search, "load", never)
    done = RUNNER.invoke(app, ["search", "tiny", "-o", str(tmp_path)])
    assert "cannot be written" in str(done.exception)
