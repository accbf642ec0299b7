"""The command line: what every command does, and progress by layer."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from minference.cli import app
from minference.cli.progress import layer_progress
from minference.testing import tiny_model

RUNNER = CliRunner()


def test_env_ls_and_inspect_speak_json() -> None:
    assert json.loads(RUNNER.invoke(app, ["env", "--json"]).stdout)["minference"]
    assert "a_shape" in json.loads(RUNNER.invoke(app, ["ls", "--json"]).stdout)["methods"]
    shown = RUNNER.invoke(app, ["inspect", "Qwen/Qwen2.5-7B-Instruct-1M", "--json"])
    assert json.loads(shown.stdout)["layers"] == 28


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
