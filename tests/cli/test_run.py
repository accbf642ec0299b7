"""`minference run`: every option, on a tiny model that is loaded from a folder."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from typer.testing import CliRunner

from minference.cli import app, main, subject
from minference.head_patterns import HeadPatterns
from minference.patterns import AShape, VerticalSlash

RUNNER = CliRunner()
SHAPE = ["--method", "a_shape:sink=64,local=128,min_seq_len=0"]
SHORT = ["--max-new-tokens", "3"]
PROMPT = ["--prompt", "one thing and another, " * 20]


def run(*arguments: str, stdin: str | None = None) -> str:
    """What the command prints on standard output."""
    done = RUNNER.invoke(app, ["run", *arguments], input=stdin)
    assert done.exit_code == 0, done.output
    return done.stdout


def as_json(*arguments: str, stdin: str | None = None) -> dict[str, Any]:
    return json.loads(run(*arguments, "--json", stdin=stdin))


def error(*arguments: str) -> str:
    return str(RUNNER.invoke(app, ["run", *arguments]).exception)


def test_compare_tells_both_sides(tiny_folder: str) -> None:
    result = as_json(tiny_folder, *PROMPT, *SHORT, "--compare", *SHAPE)
    assert result["model"] == tiny_folder
    assert result["tokens"] == 461  # 460 bytes after <bos>
    assert len(result["sparse"]["layers"]) == 4
    assert result["sparse"]["density"] < 0.8
    assert "density" not in result["dense"]
    assert result["speedup"] == result["dense"]["seconds"] / result["sparse"]["seconds"]
    assert result["same_answer"] == (result["dense"]["answer"] == result["sparse"]["answer"])
    assert result["expected"] is None


def test_a_method_that_computes_everything_answers_as_dense(tiny_folder: str) -> None:
    everything = ["--method", "a_shape:sink=512,local=512,min_seq_len=0"]
    result = as_json(tiny_folder, *PROMPT, *SHORT, "--compare", *everything)
    assert result["same_answer"]
    assert result["max_logit_difference"] < 1e-3
    assert result["sparse"]["density"] == 1


def test_the_report_says_the_same_in_words(tiny_folder: str) -> None:
    told = run(tiny_folder, *PROMPT, *SHORT, "--compare", *SHAPE, "--quiet")
    assert "461 tokens, a_shape:sink=64,local=128,min_seq_len=0" in told
    assert "dense  first token" in told
    assert "times sooner, same answer:" in told
    alone = run(tiny_folder, *PROMPT, *SHORT, *SHAPE)
    assert "sparse first token" in alone
    assert "dense" not in alone
    assert "nothing was left out" not in alone
    short = run(tiny_folder, *PROMPT, *SHORT, "--method", "a_shape")
    assert "nothing was left out: too little work" in short


def test_prompts_come_from_a_file_or_a_pipe(tiny_folder: str, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT[1], encoding="utf-8")
    named = as_json(tiny_folder, "--file", str(path), *SHORT, *SHAPE)
    piped = as_json(tiny_folder, *SHORT, *SHAPE, stdin=PROMPT[1])
    given = as_json(tiny_folder, *PROMPT, *SHORT, *SHAPE)
    assert named["sparse"]["answer"] == piped["sparse"]["answer"] == given["sparse"]["answer"]
    assert named["tokens"] == piped["tokens"] == given["tokens"]


def test_demo_facts_have_a_length_a_seed_and_an_answer(tiny_folder: str) -> None:
    facts = ["--demo-facts", "--tokens", "1k", *SHORT]
    first, second = (as_json(tiny_folder, *facts, "--seed", str(seed)) for seed in (1, 2))
    assert 900 < first["tokens"] <= 1025  # with <bos>
    assert first["seed"] == 1
    assert first["expected"] != second["expected"]
    assert first["method"] == subject.default_method()
    assert first["sparse"]["layers"] == [1.0]  # below the method's threshold
    assert f"expected       {first['expected']!r}" in run(tiny_folder, *facts, "--seed", "1")


def test_plot_draws_the_head(tiny_folder: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "new" / "head.png"
    plot = ["--plot", str(picture), "--layer", "2", "--head", "3"]
    result = as_json(tiny_folder, *PROMPT, *SHORT, *SHAPE, *plot)
    assert result["plot"] == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in run(tiny_folder, *PROMPT, *SHORT, *SHAPE, *plot)


def test_nothing_to_draw_loses_no_answer(tiny_folder: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    dense = ["--method", "a_shape", "--plot", str(tmp_path / "head.png")]  # below its threshold
    for option in ("--quiet", "--json"):
        done = RUNNER.invoke(app, ["run", tiny_folder, *PROMPT, *SHORT, *dense, option])
        assert "nothing to draw of layer 0" in str(done.exception)
        assert "answer" in done.stdout
    assert json.loads(done.stdout)["plot"] is None


def test_progress_lines_are_for_people_alone(tiny_folder: str) -> None:
    loud = RUNNER.invoke(app, ["run", tiny_folder, *PROMPT, *SHORT, *SHAPE])
    assert "loading" in loud.stderr
    assert "layer" not in loud.stderr  # no terminal, no bar
    for option in ("--quiet", "--json"):
        quiet = RUNNER.invoke(app, ["run", tiny_folder, *PROMPT, *SHORT, *SHAPE, option])
        assert "loading" not in quiet.stderr


def test_bad_options_are_named(tiny_folder: str, tmp_path: Path) -> None:
    assert "layer must be 0 to 3" in error(tiny_folder, *PROMPT, "--plot", "x.png", "--layer", "4")
    assert "valid names are .pdf, .png, .svg" in error(tiny_folder, *PROMPT, "--plot", "x.txt")
    assert "cannot be written" in error(
        tiny_folder, *PROMPT, "--plot", f"{tiny_folder}/config.json/x.png"
    )
    assert "unknown method 'a_shap'" in error(tiny_folder, *PROMPT, "--method", "a_shap")
    assert "16384, 16k or 1m" in error(tiny_folder, "--demo-facts", "--tokens", "1x")
    assert "got --prompt and --demo-facts" in error(tiny_folder, *PROMPT, "--demo-facts")
    assert "cannot be read as text" in error(tiny_folder, "--file", str(tmp_path / "none.txt"))
    assert "the model takes 4096" in error(tiny_folder, "--prompt", "a" * 5000)
    assert "prompt is empty" in error(tiny_folder, "--prompt", "")


def test_a_prompt_that_cannot_be_asked_is_named_before_loading(tiny_folder: str) -> None:
    for options, why in (
        (["--prompt", " "], "the prompt is empty"),
        (["--demo-facts", "--tokens", "0"], "16384, 16k or 1m"),
        (["--demo-facts", "--tokens", "1m"], "have 1048576 tokens, the model takes 4096"),
    ):
        done = RUNNER.invoke(app, ["run", tiny_folder, *options])
        assert why in str(done.exception)
        assert "loading" not in done.stderr


def test_a_head_that_is_not_there_is_named_before_loading(tiny_folder: str) -> None:
    for options in (["--layer", "99"], ["--head", "4"]):
        done = RUNNER.invoke(app, ["run", tiny_folder, *PROMPT, "--plot", "x.png", *options])
        assert "must be 0 to 3 for this model" in str(done.exception)
        assert "loading" not in done.stderr


def test_patterns_in_the_models_folder_are_taken(tiny_folder: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    copytree(tiny_folder, folder)
    row = (AShape(64, 64), AShape(64, 64), AShape(64, 64), VerticalSlash(30, 60))
    table = HeadPatterns((row,) * 4).save(folder / "patterns.json")
    words = [str(folder), *PROMPT, *SHORT]
    done = RUNNER.invoke(app, ["run", *words, "--method", "minference:min_seq_len=0"])
    assert f"patterns of {table}" in done.stderr
    told = as_json(*words, "--method", "minference:min_seq_len=0")
    named = as_json(*words, "--method", f"minference:min_seq_len=0,patterns={table}")
    assert told["sparse"]["layers"] == named["sparse"]["layers"]
    assert told["patterns"] == named["patterns"] == str(table)
    assert told["method"] == "minference:min_seq_len=0"
    for budgets in ("vertical=500,slash=500", "budget_length=none"):
        own = as_json(*words, "--method", f"minference:min_seq_len=0,{budgets}")
        assert own["sparse"]["layers"] != told["sparse"]["layers"]
        assert own["patterns"] is None
    other = RUNNER.invoke(app, ["run", *words, *SHAPE])
    assert "patterns of" not in other.stderr
    table.rename(folder / "head_patterns.json")
    assert as_json(*words, "--method", "minference:min_seq_len=0")["patterns"].endswith(
        "head_patterns.json"
    )


def test_a_terminal_is_no_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    with pytest.raises(ValueError, match="no prompt; give --prompt TEXT"):
        subject.text(None, None, False)


def test_a_model_that_is_not_there_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    gone = str(tmp_path / "gone")
    monkeypatch.setattr("sys.argv", ["minference", "run", gone, "--prompt", "a"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert told[-1].startswith(f"error: model {gone!r} cannot be loaded: ")
    assert len(told) == 1


def test_what_the_system_refuses_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["minference", "bench", "attention", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert "directory" in told[0]
