"""`minference eval infinitebench | pg19 | ruler` at the command line, on a stand-in model."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from minference.cli import eval as command
from minference.cli import eval_model
from minference.eval.infinitebench.files import Example, to_line
from minference.eval.runner import Subject
from minference.testing import tiny_model

METHODS = ["--methods", "dense,a_shape:sink=8,local=64"]


class Bytes:
    bos_token_id = 300

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[*([300] if add_special_tokens else []), *text.encode()])

    def decode(self, ids: torch.Tensor) -> str:
        return bytes(min(i, 255) for i in ids.tolist()).decode("latin-1")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3")
    model.set_attn_implementation("sdpa")
    monkeypatch.setattr(
        eval_model, "load_subject", lambda name, device: Subject(name, model, Bytes())
    )
    monkeypatch.setattr(eval_model, "load_tokenizer", lambda name: Bytes())
    monkeypatch.setattr(eval_model, "token_limit", lambda name: None)


def invoke(*words: object) -> str:
    done = CliRunner().invoke(command.app, [str(word) for word in words])
    if done.exception is not None:
        raise done.exception
    return done.stdout


def test_infinitebench_reads_files_and_generates(tmp_path: Path) -> None:
    file, out = tmp_path / "math_find.jsonl", tmp_path / "out"
    question = "You should answer with one number. The third number is the answer."
    file.write_text(to_line(Example("math_find", 4, "[1, 2, 3]", question, (3,))))
    options = ["--length", "1k", "--samples", "2", "-o", out, "--quiet"]
    shown = invoke("infinitebench", "tiny", file, "passkey", *METHODS, *options)
    assert "| math_find | 1024 | 1 | `dense` |" in shown
    assert "| passkey | 1024 | 2 | `a_shape:sink=8,local=64` |" in shown
    assert invoke("report", out) == shown
    found = json.loads(invoke("report", out, "--json"))["scores"]
    assert [(s["kind"], s["task"], s["method"]) for s in found[:1]] == [
        ("infinitebench", "math_find", "dense")
    ]


def test_pg19_reads_a_folder_by_length(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "1.txt").write_text("Call me. " * 200)
    options = ["--lengths", "256,1k", "-o", tmp_path / "out"]
    shown = invoke("pg19", "tiny", tmp_path / "books", *METHODS, *options, "--json")
    found = [(s["length"], s["method"], s["measure"]) for s in json.loads(shown)["scores"]]
    assert found == [(n, m, "bits_per_byte") for n in (256, 1024) for m in METHODS[1].split(",", 1)]


@pytest.mark.parametrize(
    "words", [["pg19", "tiny", ".", "--books"], ["infinitebench", "tiny", "passkey", "--samples"]]
)
def test_counts_below_1_are_refused(words: list[str]) -> None:
    done = CliRunner().invoke(command.app, [*words, "0"])
    assert done.exit_code == 2
    assert f"Invalid value for '{words[-1]}'" in done.output


@pytest.mark.parametrize(
    "words", [["pg19", "tiny", ".", "--lengths"], ["infinitebench", "tiny", "passkey", "--length"]]
)
def test_longer_prompts_than_the_model_takes_are_refused(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eval_model, "token_limit", lambda name: 4096)
    with pytest.raises(ValueError, match="the 4096 tokens that the model takes, got 8192"):
        invoke(*words, "8k")


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device 'foo' cannot be used"):
        invoke("pg19", "tiny", tmp_path, "--device", "foo")


def test_kinds_of_results_lie_in_one_folder(tmp_path: Path) -> None:
    (tmp_path / "1.txt").write_text("Call me. " * 200)
    out = ["-o", tmp_path / "out", "--quiet", "--methods", "dense"]
    invoke("tiny", "--tasks", "niah", "--lengths", "1k", "--samples", "1", *out)
    invoke("pg19", "tiny", tmp_path, "--lengths", "256", *out)
    tables = invoke("report", tmp_path / "out").split("\n\n")
    assert [table.splitlines()[0].split("|")[1].strip() for table in tables] == ["task", "task"]
    assert "perplexity" in tables[1]


def test_unknown_ruler_tasks_list_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="niah_single_1"):
        invoke("ruler", "tiny", "--tasks", "niah_single")
