"""The command line: names, lengths, methods, and a whole run on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from minference.cli import app, run
from minference.cli.progress import layer_progress
from minference.testing import tiny_model

RUNNER = CliRunner()


class Bytes:
    """A tokenizer of bytes."""

    def __call__(self, text: str, return_tensors: str) -> Any:
        ids = torch.tensor([[3 + byte for byte in text.encode()]])
        return type("Encoded", (), {"input_ids": ids})()

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def test_env_ls_and_inspect_speak_json() -> None:
    assert json.loads(RUNNER.invoke(app, ["env", "--json"]).stdout)["minference"]
    assert "a_shape" in json.loads(RUNNER.invoke(app, ["ls", "--json"]).stdout)["methods"]
    shown = RUNNER.invoke(app, ["inspect", "Qwen/Qwen2.5-7B-Instruct-1M", "--json"])
    assert json.loads(shown.stdout)["layers"] == 28


def test_run_compares_and_plots(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    load: Callable[[str], tuple[Any, Any]] = lambda name: (tiny_model(), Bytes())  # noqa: E731
    monkeypatch.setattr(run, "load", load)
    arguments = ["tiny", "--prompt", "a" * 300, "--compare", "--json", "--max-new-tokens", "3"]
    method = ["--method", "a_shape:sink=512,local=512,min_seq_len=0"]
    picture = tmp_path / "new" / "head.png"
    plot = ["--plot", str(picture), "--layer", "2", "--head", "3"]
    done = RUNNER.invoke(app, ["run", *arguments, *method, *plot])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["same_answer"]
    assert result["max_logit_difference"] < 1e-3
    assert len(result["sparse"]["layers"]) == 4
    assert result["tokens"] == 300
    assert picture.read_bytes().startswith(b"\x89PNG")
    wrong = RUNNER.invoke(app, ["run", *arguments, *method, "--plot", "x.png", "--layer", "4"])
    assert "--layer must be 0 to 3 for this model, got 4" in str(wrong.exception)


def test_progress_counts_the_layers_of_one_prefill(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with layer_progress(model, "sparse", quiet=False):
        model(torch.tensor([[3, 4, 5]]))
        model(torch.tensor([[3, 4, 5]]))
    assert "4/4" in capsys.readouterr().err
    assert not any(layer._forward_hooks for layer in model.get_decoder().layers)
