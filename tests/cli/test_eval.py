"""`minference eval` at the command line, on a model that is loaded by a stand-in."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from minference.cli import eval as command
from minference.eval.runner import Subject
from minference.testing import tiny_model

RUN = ["tiny", "--tasks", "niah", "--lengths", "1k", "--samples", "2"]
METHODS = ["--methods", "dense,a_shape:sink=8,local=64"]


class Bytes:
    bos_token_id = 300

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[*([300] if add_special_tokens else []), *text.encode()])

    def decode(self, ids: object) -> str:
        return str(ids)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3")
    model.set_attn_implementation("sdpa")
    monkeypatch.setattr(command, "_load", lambda name, device: Subject(name, model, Bytes()))


def test_run_then_report_print_the_same_table(tmp_path: Path) -> None:
    first = CliRunner().invoke(command.app, [*RUN, *METHODS, "--quiet", "-o", str(tmp_path)])
    assert first.exit_code == 0, first.output
    again = CliRunner().invoke(command.app, ["report", str(tmp_path)])
    assert again.stdout == first.stdout
    assert "| niah | 1024 | 2 on 2 prompts, end | `dense` |" in again.stdout


def test_json_and_progress(tmp_path: Path) -> None:
    CliRunner().invoke(command.app, [*RUN, *METHODS, "-o", str(tmp_path)])
    shown = CliRunner().invoke(command.app, ["report", str(tmp_path), "--json"])
    found = {score["method"]: score["density"] for score in json.loads(shown.stdout)["scores"]}
    assert found["dense"] == 1.0
    assert found["a_shape:sink=8,local=64"] < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "nia"], "niah"),
        (["--methods", "dens"], "dense"),
        (["--placement", "front"], "spread"),
        (["--split", "train"], "heldout"),
    ],
)
def test_unknown_names_list_the_valid_ones(options: list[str], message: str) -> None:
    result = CliRunner().invoke(command.app, [*RUN, *options])
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)
