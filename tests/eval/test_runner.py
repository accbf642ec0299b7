"""Runs that go on: same questions for every method, kills, broken lines, other models."""

import json
import logging
import multiprocessing
from collections import Counter
from pathlib import Path

import pytest

from minference.eval.packed import CELL
from minference.eval.plan import draw_all, make_cells, resolve_tasks, valid_tasks
from minference.eval.records import FILE_NAME, Records, key_of
from minference.eval.runner import Subject, run_cells
from minference.eval.scoring import encode
from minference.methods.spec import parse_methods
from minference.viz.needle import needle_grids

SPECS = parse_methods("dense,a_shape:sink=8,local=64")
CELLS = list(make_cells(["single"], [1024], samples=4, placement="spread", questions=2))


@pytest.mark.parametrize("placement", ["spread", "end"])
def test_every_method_answers_the_same_questions(
    tmp_path: Path, placement: str, subject: Subject
) -> None:
    cells = make_cells(["single", "passkey"], [1024], samples=2, placement=placement, questions=2)
    records = run_cells(subject, SPECS, cells, tmp_path)
    asked = [[r["answer"] for r in records.of("question") if r["method"] == s.label] for s in SPECS]
    assert asked[0] == asked[1]
    assert len(asked[0]) == 4
    density = {r["method"]: sum(r["density"]) / 4 for r in records.of("prefill")}
    assert density["dense"] == 1.0
    assert density[SPECS[1].label] < 0.5


def test_a_prompt_does_not_depend_on_how_many_are_asked() -> None:
    few, many = (next(make_cells(["niah"], [1024], samples=n)) for n in (2, 9))
    assert [few.order(seed) for seed in range(2)] == [many.order(seed) for seed in range(2)]


NAMED = dict.fromkeys(CELL, "x") | {"record": "cell", "length": 1, "questions": 1}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (json.dumps(NAMED | {"seeds": [], "correct": "1"}), "list index out of range"),
        (json.dumps(NAMED | {"seeds": [0, 1], "correct": "x"}), "invalid literal"),
        ('{"record": ["run"]}', "unhashable"),
        ('{"record": "question", "task": "t"}', "a 'question' without length, placement"),
        ('{"record": "answers"}', "no object with 'record' of run, question"),
        ("[1]", "no object with 'record'"),
    ],
)
def test_a_line_that_lacks_something_is_named(tmp_path: Path, line: str, why: str) -> None:
    (tmp_path / FILE_NAME).write_text(f'{{"record": "run", "model": "m"}}\n{line}\n')
    records = Records.read(tmp_path / FILE_NAME)
    assert [record["record"] for record in records.lines] == ["run"]
    assert records.broken[0][0] == 2
    assert why in records.broken[0][1]


def test_an_interrupted_run_goes_on_and_loses_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, subject: Subject
) -> None:
    whole = run_cells(subject, SPECS, CELLS, tmp_path / "whole")
    path = tmp_path / "cut" / FILE_NAME
    path.parent.mkdir()
    text = (tmp_path / "whole" / FILE_NAME).read_text()
    path.write_text(text[: len(text) * 2 // 3])
    with caplog.at_level(logging.WARNING, logger="minference"):
        again = run_cells(subject, SPECS, CELLS, tmp_path / "cut")
    assert "cannot be read" in caplog.text
    expected = {key_of(r): r["correct"] for r in whole.of("question")}
    assert {key_of(r): r["correct"] for r in again.of("question")} == expected
    kept = Records.read(path)
    assert kept.broken == []
    assert len(list(kept.of("question"))) == len(expected)
    assert path.with_name(f"{FILE_NAME}.broken").exists()


def test_a_finished_run_asks_nothing(tmp_path: Path, subject: Subject) -> None:
    first = len(list(run_cells(subject, SPECS, CELLS, tmp_path).of("prefill")))
    second = len(list(run_cells(subject, SPECS, CELLS, tmp_path).of("prefill")))
    assert first == second


def test_a_folder_belongs_to_one_model(tmp_path: Path, subject: Subject) -> None:
    line = json.dumps({"record": "run", "model": "other"})
    (tmp_path / FILE_NAME).write_text(line + "\n")
    with pytest.raises(ValueError, match="other"):
        run_cells(subject, SPECS, CELLS, tmp_path)


def test_unknown_tasks_list_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=", ".join(valid_tasks())):
        resolve_tasks(["nia"])
    assert resolve_tasks(["infinitebench"]) == ["passkey", "number_string", "key_value"]


def test_needles_lie_at_the_grid_of_depths() -> None:
    cell = next(iter(make_cells(["niah"], [2048], samples=5)))
    assert [cell.order(seed)[-1] for seed in range(5)] == [0, 0.25, 0.5, 0.75, 1]


def test_encode_starts_a_sequence_once(subject: Subject) -> None:
    tokenizer = subject.tokenizer
    assert encode(tokenizer, "ab", start=True) == [300, 97, 98]
    assert encode(tokenizer, "ab") == [97, 98]


def test_prompts_drawn_by_other_processes_are_the_same() -> None:
    orders = [cell.order(seed) for cell in CELLS for seed in range(2)]
    assert list(draw_all(orders, len, workers=1)) == list(draw_all(orders, len))


def test_a_run_that_stops_early_leaves_no_process(tmp_path: Path, subject: Subject) -> None:
    def stop(done: int, total: int, what: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cells(subject, SPECS, CELLS, tmp_path, progress=stop, workers=1)
    assert multiprocessing.active_children() == []
    assert len(list(Records.read(tmp_path / FILE_NAME).of("prefill"))) == 2
    seen: list[int] = []
    run_cells(subject, SPECS, CELLS, tmp_path, progress=lambda done, *_: seen.append(done))
    assert seen == [1, 2]


def test_the_needle_grid_is_asked_in_full(tmp_path: Path, subject: Subject) -> None:
    cells = make_cells(["niah"], [1024, 2048], samples=4, depths=2)
    records = run_cells(subject, SPECS, cells, tmp_path)
    for method in (spec.label for spec in SPECS):
        asked = [(r["length"], r["depth"]) for r in records.of("question") if r["method"] == method]
        # a needle stands at the first line that starts behind its depth
        near = Counter((length, round(depth)) for length, depth in asked)
        assert near == {(length, depth): 2 for length in (1024, 2048) for depth in (0, 1)}
        grids = needle_grids(records.lines, method, rows=2)
        assert all(int(grid.count.min()) == 2 for grid in grids)
