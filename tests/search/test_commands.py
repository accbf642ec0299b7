"""The five commands of docs/search.md, on the shipped model and short prompts."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minference.cli import app
from minference.head_patterns import HeadPatterns

ROOT = Path(__file__).parents[2]


def commands(folder: Path) -> list[list[str]]:
    """The first block of the page; lengths cut to 1K, files moved to a folder of the test."""
    block = re.search(r"```\n(minference .*?)```", (ROOT / "docs/search.md").read_text(), re.DOTALL)
    assert block is not None
    text = block.group(1).replace("out/", f"{folder}/").replace("models/", f"{ROOT}/models/")
    text = re.sub(r"\b(8|16)k\b", "1k", text).replace("--samples 5", "--samples 1")
    text = text.replace("minference:patterns", "minference:min_seq_len=0,patterns")
    return [shlex.split(line)[1:] for line in text.splitlines()]


@pytest.mark.slow
def test_from_an_unknown_model_to_a_table_that_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = commands(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert [line[0] for line in lines] == ["search", "inspect", "search", "eval", "run"]
    done = None
    for line in lines:
        done = CliRunner().invoke(app, line)
        assert done.exit_code == 0, (line, done.output, done.exception)
    assert HeadPatterns.from_file(tmp_path / "patterns.json").shape == (6, 8)
    recall = HeadPatterns.from_file(tmp_path / "recall.json").provenance.recall
    assert recall is not None
    assert recall >= 0.95
    assert done is not None
    assert "first token" in done.stdout
