"""The search command, from a text to a file that `inspect` reads, and what it refuses at once."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from typer.testing import CliRunner, Result

from minference.cli import app, search
from minference.head_patterns import HeadPatterns

RUNNER = CliRunner()


def run(model: str, out: Path, *options: str) -> Result:
    small = ["--rows", "4", "--cost", "counted"]
    return RUNNER.invoke(app, ["search", model, "-o", str(out), *small, *options])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text("one line after another, and so on. " * 20)
    return path


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading weights fails the test."""

    def never(name: str) -> Any:
        raise AssertionError(name)

    monkeypatch.setattr(search, "load", never)


def test_a_search_writes_a_table(tmp_path: Path, tiny_folder: str, text: Path) -> None:
    out = tmp_path / "new" / "patterns.json"
    done = run(tiny_folder, out, "--text", str(text), "--name", "some/model", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert sum(result["heads"].values()) == 16
    assert result["lengths"] == [701]
    assert result["speedup_is"] == "counted"
    assert result["speedup"]["131072"] == pytest.approx(1 / result["density"]["131072"])
    table = HeadPatterns.from_file(out)
    assert table.shape == (4, 4)
    assert table.provenance.model == "some/model"
    assert [path.name for path in out.parent.iterdir()] == ["patterns.json"]
    shown = RUNNER.invoke(app, ["inspect", str(out)])
    assert "4 layers, 4 heads" in shown.stdout


def test_a_table_that_cannot_be_saved_loses_no_search(
    tmp_path: Path, tiny_folder: str, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: HeadPatterns, path: Path) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "patterns.json"
    with monkeypatch.context() as patch:
        patch.setattr(HeadPatterns, "save", full)
        done = run(tiny_folder, out, "--text", str(text))
    assert "No space left" in str(done.exception)
    kept = json.loads((tmp_path / ".patterns.json.partial").read_text())
    assert kept["ended"] == ["scores/0"]
    assert run(tiny_folder, out, "--text", str(text)).exit_code == 0
    assert not (tmp_path / ".patterns.json.partial").exists()
    assert HeadPatterns.from_file(out).shape == (4, 4)


def test_generated_prompts_card_and_plots(tmp_path: Path, tiny_folder: str) -> None:
    out, card, plots = tmp_path / "patterns.json", tmp_path / "card.md", tmp_path / "plots"
    options = ["--tasks", "key_value", "--lengths", "1k,2k", "--objective", "mass"]
    done = run(tiny_folder, out, *options, "--card", str(card), "--plots", str(plots))
    assert done.exit_code == 0, done.output
    assert "mass score" in done.stdout
    assert "at 128K" in done.stdout
    assert {path.name for path in plots.iterdir()} == {"head_map.png", "recall.png"}
    page = card.read_text()
    table = HeadPatterns.from_file(out)
    assert f"| date | {table.provenance.date} |" in page
    assert "![plots/recall.png](plots/recall.png)" in page
    first = re.search(r"## Kinds.*?\| 0 \|([^\n]*)\|\n", page, re.DOTALL)
    assert first is not None
    assert sum(int(x) for x in first.group(1).split("|")) == 4
    for told in (
        "| 128K |",
        "keep less than 0.8",
        "its kind",
        "the most there can be",
        '"patterns.json"',
    ):
        assert told in page
    again = run(tiny_folder, out, *options, "--recall", "0.9", "--card", str(card))
    assert again.exit_code == 0, again.output
    assert "grown to a kept mass of 0.9" in card.read_text()


@pytest.mark.usefixtures("unloaded")
def test_paths_are_refused_before_weights_are_loaded(
    tmp_path: Path, tiny_folder: str, text: Path
) -> None:
    good = tmp_path / "patterns.json"
    for out, options in (
        (tmp_path, ()),
        (text / "patterns.json", ()),
        (Path("/proc/patterns.json"), ()),
        (good, ("--card", str(tmp_path))),
        (good, ("--plots", str(text))),
    ):
        done = run(tiny_folder, out, *options)
        assert isinstance(done.exception, ValueError), (out, options)
        assert "cannot be written" in str(done.exception)


@pytest.mark.usefixtures("unloaded")
def test_two_outputs_are_two_files(tmp_path: Path, tiny_folder: str) -> None:
    out = tmp_path / "t.json"
    for option in ("--card", "--text"):
        done = run(tiny_folder, out, option, str(tmp_path / "." / "t.json"))
        assert "is named twice" in str(done.exception)


@pytest.mark.usefixtures("unloaded")
def test_prompts_are_refused_before_weights_are_loaded(
    tmp_path: Path, tiny_folder: str, text: Path
) -> None:
    out = tmp_path / "patterns.json"
    for content, message in (
        ("too short", "at least 512 tokens"),
        ("long " * 1000, "4096 tokens that the model takes, got 5001"),
    ):
        text.write_text(content)
        done = run(tiny_folder, out, "--text", str(text))
        assert message in str(done.exception)
    endless = run(tiny_folder, out, "--lengths", "1k,500m")  # refused before they are written
    assert "4096 tokens that the model takes, got 524288000" in str(endless.exception)
    missing = run(tiny_folder, out, "--text", str(tmp_path / "none.txt"))
    assert "none.txt' cannot be read as text" in str(missing.exception)
    assert "no model" in str(run("no model", out).exception)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("t5", "'t5' is an encoder-decoder"),
        ("vit", "no causal language model of the type 'vit'"),
        ("bert", "attention of BertLMHeadModel is not causal"),
        ("mamba", "MambaForCausalLM has no attention layers"),
        ("bloom", "AttentionInterface"),
        ("gemma3_text", "no layer of full causal attention"),
    ],
)
def test_models_are_refused_before_weights_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, message: str
) -> None:
    layers = {"n_layer" if kind == "bloom" else "num_hidden_layers": 2}
    windows = {"layer_types": ["sliding_attention"] * 2} if kind == "gemma3_text" else {}
    config = AutoConfig.for_model(kind, **layers, **windows)
    monkeypatch.setattr(search, "describe", lambda name: (config, None))
    done = run("some/model", tmp_path / "patterns.json")
    assert message in str(done.exception)
