"""`minference eval` at the command line, on a model that is loaded by a stand-in."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from minference.cli import app, eval_model
from minference.cli import eval as command
from minference.eval.runner import Subject
from minference.head_patterns import default_patterns
from minference.patterns import AShape, Dense
from minference.testing import tiny_model

RUN = ["--tasks", "niah", "--lengths", "1k", "--samples", "2"]
METHODS = ["--methods", "dense,a_shape:sink=8,local=64"]


class Bytes:
    bos_token_id = 300

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[*([300] if add_special_tokens else []), *text.encode()])

    def decode(self, ids: object) -> str:
        return str(ids)


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that were loaded."""
    model, names = tiny_model("qwen3"), []
    model.set_attn_implementation("sdpa")

    def load(name: str, device: str | None) -> Subject:
        names.append(name)
        return Subject(name, model, Bytes())

    monkeypatch.setattr(eval_model, "load_subject", load)
    monkeypatch.setattr(eval_model, "load_tokenizer", lambda name: Bytes())
    monkeypatch.setattr(eval_model, "token_limit", lambda name: 16_384)
    return names


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
    ("words", "model"),
    [
        ([], "models/needle"),
        (["run"], "models/needle"),
        (["tiny"], "tiny"),
        (["run", "tiny"], "tiny"),
    ],
)
def test_run_and_the_shipped_model_go_without_saying(
    words: list[str], model: str, loaded: list[str], tmp_path: Path
) -> None:
    options = [*RUN, "--methods", "dense", "-o", str(tmp_path), "--json"]
    result = CliRunner().invoke(app, ["eval", *words, *options])
    assert result.exit_code == 0, result.output
    assert loaded == [model]
    (score,) = json.loads(result.stdout)["scores"]
    assert (score["total"], score["recall"]) == (2, 1.0)


def test_help_lists_the_commands() -> None:
    shown = CliRunner().invoke(command.app, ["--help"])
    assert shown.exit_code == 0
    assert "report" in shown.output
    assert "--depths" in CliRunner().invoke(command.app, ["run", "--help"]).output


def test_the_default_model_is_missed_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    for load in (
        lambda name: eval_model.load_subject(name, None),
        eval_model.load_tokenizer,
        eval_model.token_limit,
    ):
        with pytest.raises(ValueError, match="'models/needle' of the repository is not here"):
            load(eval_model.DEFAULT_MODEL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "nia"], "did you mean 'niah'? valid names are common_words, "),
        (["--methods", "dens"], "did you mean 'dense'?"),
        (["--methods", "a_shape:locl=3"], "did you mean 'local'?"),
        (["--placement", "front"], "cached, end, spread"),
        (["--split", "train"], "dev, heldout"),
        (["--lengths", "4.5k"], "16384, 16k or 1m"),
        (["--samples", "0"], "samples must be at least 1"),
        (["--depths", "0"], "depths must be at least 1"),
        (["--lengths", "4k,64"], "with 1 questions does not fit into length 64"),
        (["--lengths", "1k,10m"], "at most the 16384 tokens that the model takes, got 10485760"),
        (["-o", __file__], "results cannot be written to"),
        (["--device", "foo"], "device 'foo' cannot be used: "),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used: "),
        (["--device", "meta"], "device 'meta' cannot be used: "),
    ],
)
def test_bad_input_is_named_before_the_model_is_loaded(
    options: list[str], message: str, loaded: list[str]
) -> None:
    result = CliRunner().invoke(command.app, [*RUN, *options])
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)
    assert loaded == []


def test_a_negative_count_of_workers_is_refused_before_the_model_is_loaded(
    loaded: list[str],
) -> None:
    result = CliRunner().invoke(command.app, [*RUN, "--workers", "-3"])
    assert result.exit_code == 2
    assert "Invalid value for '--workers'" in result.output
    assert loaded == []


def test_the_token_limit_is_that_of_the_configuration(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: str
) -> None:
    monkeypatch.undo()
    assert eval_model.token_limit(tiny_folder) == 4096


def test_a_changed_table_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    table, out = tmp_path / "tab.json", tmp_path / "out"
    options = [*RUN, "--methods", f"minference:patterns={table}", "-o", str(out), "--quiet"]
    default_patterns(4, 4, Dense()).save(table)
    assert CliRunner().invoke(command.app, options).exit_code == 0
    kept = (out / "samples.jsonl").read_text()
    default_patterns(4, 4, AShape(1, 1)).save(table)
    again = CliRunner().invoke(command.app, options)
    assert isinstance(again.exception, ValueError)
    assert "name another folder with -o" in str(again.exception)
    assert (out / "samples.jsonl").read_text() == kept


def test_a_refused_value_is_named_before_any_prompt(tmp_path: Path) -> None:
    options = [*RUN, "--methods", "dense,a_shape:local=-1", "-o", str(tmp_path)]
    result = CliRunner().invoke(command.app, options)
    assert isinstance(result.exception, ValueError)
    assert "local" in str(result.exception)
    assert not (tmp_path / "samples.jsonl").exists()


def test_a_broken_file_is_reported_and_mended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = [*RUN, *METHODS, "--quiet", "-o", str(tmp_path)]
    first = CliRunner().invoke(command.app, options)
    path = tmp_path / "samples.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], "{ not json\n", *lines[3:-1], lines[-1][:20]]))
    shown = CliRunner().invoke(command.app, ["report", str(tmp_path)])
    assert shown.exit_code == 0
    assert "line 3 cannot be read" in caplog.text
    again = CliRunner().invoke(command.app, options)
    without_times = [t.rsplit("|", 2)[0] for t in first.stdout.splitlines()]
    assert [t.rsplit("|", 2)[0] for t in again.stdout.splitlines()] == without_times
    assert (tmp_path / "samples.jsonl.broken").read_text() == lines[-1][:20] + "\n"
