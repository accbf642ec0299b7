"""The benchmark behind the page's table: cells, a stop in time, packing twice, writing the page."""

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import eval_table
from minference.bench.peers import read_times
from minference.eval.records import Records
from minference.eval.runner import Subject

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "eval_h200.jsonl"
TIMES = RESULTS.with_name("peer_times_h200.jsonl")
RUN = ["run", "--tasks", "single", "--lengths", "1k", "--methods", "dense,a_shape:sink=8,local=64"]
RUN += ["--prompts", "2", "--questions", "2"]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch, subject: Subject) -> None:
    monkeypatch.setattr(eval_table, "load", lambda name: (subject.model, subject.tokenizer))


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["eval_table.py", *words])
    eval_table.main()


def test_a_run_that_was_out_of_time_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "a")
    call(monkeypatch, *RUN, "--folder", folder, "--seconds", "0")
    assert "the same command goes on" in capsys.readouterr().out
    call(monkeypatch, *RUN, "--folder", folder)
    shown = capsys.readouterr().out
    assert "4 questions on 2 prompts" in shown
    assert "goes on" not in shown
    out = tmp_path / "packed.jsonl"
    for _ in range(2):
        call(monkeypatch, "pack", folder, "--out", str(out), "--least", "4")
    packed = Records.read(out).lines
    assert len([r for r in packed if r["record"] == "question"]) == 8
    assert any("commit" in record for record in packed if record["record"] == "run")
    capsys.readouterr()
    call(monkeypatch, "table", str(out))
    assert capsys.readouterr().out.strip() in shown


def test_cells_with_too_few_questions_are_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    call(monkeypatch, *RUN, "--folder", str(tmp_path / "a"), "--untimed")
    out = tmp_path / "packed.jsonl"
    call(monkeypatch, "pack", str(tmp_path / "a"), "--out", str(out))
    assert {record["record"] for record in Records.read(out).lines} == {"run"}
    packed = Records.read(tmp_path / "a" / "packed.jsonl").of("prefill")
    assert all("seconds" not in record for record in packed)


def test_a_page_is_written_between_its_marks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    call(monkeypatch, *RUN, "--folder", str(tmp_path / "a"))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{eval_table.MARK}\nold\n{eval_table.MARK}\nbehind\n")
    call(monkeypatch, "table", str(tmp_path / "a" / "packed.jsonl"), "--write", str(page))
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("behind\n")
    assert "| `dense` |" in text
    assert "old" not in text
    page.write_text("no marks\n")
    with pytest.raises(SystemExit, match="no two lines"):
        call(monkeypatch, "table", str(tmp_path / "a" / "packed.jsonl"), "--write", str(page))


def test_times_of_the_length_stand_beside_the_answers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(monkeypatch, *RUN, "--folder", str(tmp_path / "a"), "--untimed")
    packed = str(tmp_path / "a" / "packed.jsonl")
    times = tmp_path / "times.jsonl"
    record = {"op": "peer", "method": "a_shape:sink=8,local=64", "length": 1024, "gpu": None}
    record |= {"together_ms": 1.5, "speedup": 2.25, "speedup_over": "fa3", "density": 0.1}
    times.write_text(json.dumps(record) + "\n")
    capsys.readouterr()
    call(monkeypatch, "table", packed, "--times", str(times))
    head, _, dense, sparse = capsys.readouterr().out.strip().splitlines()[2:]
    assert head.endswith("| recall | attention of a layer | speed-up |")
    assert dense.endswith("| - | - |")
    assert sparse.endswith("| 1.50 ms | 2.25 |")
    times.write_text(json.dumps(record | {"length": 2048}) + "\n")
    call(monkeypatch, "table", packed, "--times", str(times))
    assert "speed-up" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("placement", "prompts", "questions"), [("spread", 25, 12), ("end", 200, 1)]
)
def test_a_cell_has_enough_questions_over_enough_prompts(
    placement: str, prompts: int, questions: int
) -> None:
    options = argparse.Namespace(
        prompts=None,
        questions=None,
        placement=placement,
        tasks="retrieval",
        lengths=[65_536, 131_072],
        split="heldout",
    )
    cells = eval_table.cells_of(options)
    assert len(cells) == 10
    assert {(cell.prompts, cell.questions) for cell in cells} == {(prompts, questions)}


def test_the_pages_show_the_committed_results() -> None:
    lines, times = Records.read(RESULTS).lines, read_times([TIMES])
    page = (ROOT / "docs" / "evaluation.md").read_text("utf-8")
    assert eval_table.tables(lines, times=times) in page
    assert eval_table.tables(lines, "32k-spread") in (ROOT / "README.md").read_text("utf-8")
    assert RESULTS.stat().st_size < 5_000_000
