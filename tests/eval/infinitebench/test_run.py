"""InfiniteBench with a model: cut prompts, greedy answers, records and their table."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minference.eval.infinitebench.files import Example, to_line
from minference.eval.infinitebench.prompts import NEW_TOKENS, prompt_of
from minference.eval.infinitebench.run import (
    KIND,
    answer_example,
    cut_middle,
    prompt_limit,
    read_sources,
    score_table,
)
from minference.eval.items import Item, run_items
from minference.eval.runner import Subject
from minference.eval.scoring import encode
from minference.methods import Dense
from minference.methods.spec import parse_methods

SPECS = parse_methods("dense,a_shape:sink=8,local=64")


def example(task: str = "passkey", **fields: Any) -> Example:
    own = {"id": 0, "context": "The pass key is 12345.\n" * 9, "input": "What?"} | fields
    return Example(task, own["id"], own["context"], own["input"], ("12345",))


def test_a_long_prompt_loses_its_middle() -> None:
    assert cut_middle([1, 2, 3], 3) == [1, 2, 3]
    assert cut_middle(list(range(10)), 4) == [0, 1, 8, 9]
    assert cut_middle(list(range(10)), 5) == [0, 1, 7, 8, 9]


def test_the_answer_is_what_generate_gives(subject: Subject) -> None:
    item = Item("passkey", 150, 0, example())
    ids = cut_middle(encode(subject.tokenizer, prompt_of(item.content), start=True), 150)
    got = answer_example(subject, Dense(), item)
    whole = subject.model.generate(
        torch.tensor([ids]), max_new_tokens=NEW_TOKENS["passkey"], do_sample=False
    )
    stops = subject.model.generation_config.eos_token_id
    tokens = [int(t) for t in whole[0, 150:]]
    tokens = tokens[: tokens.index(stops)] if stops in tokens else tokens
    assert got["got"] == subject.tokenizer.decode(torch.tensor(tokens))
    assert (got["tokens"], got["answer"], got["density"]) == (150, ["12345"], [1.0] * 4)


def test_the_answer_stops_where_the_model_does(subject: Subject) -> None:
    item = Item("passkey", 150, 0, example())
    first = answer_example(subject, Dense(), item)["got"][0]
    subject.model.generation_config.eos_token_id = [0, ord(first)]
    assert answer_example(subject, Dense(), item)["got"] == ""


def test_files_and_generated_tasks_are_sources(tmp_path: Path, subject: Subject) -> None:
    path = tmp_path / "kv_retrieval.jsonl"
    path.write_text("".join(to_line(example("kv_retrieval", id=i)) for i in range(3)))
    found = read_sources([str(path), "passkey"], subject, 600, samples=2)
    assert [(i.task, i.index, i.length) for i in found] == [
        ("kv_retrieval", 0, 600),
        ("kv_retrieval", 1, 600),
        ("passkey", 0, 600),
        ("passkey", 1, 600),
    ]
    with pytest.raises(FileNotFoundError, match="passkey, number_string, kv_retrieval"):
        read_sources(["math_find"], subject, 600)


def test_the_answer_has_room_in_a_model_that_the_prompt_would_fill(subject: Subject) -> None:
    assert prompt_limit("passkey", None) is None
    assert prompt_limit("passkey", 4096) == 4096 - NEW_TOKENS["passkey"]
    assert prompt_limit("math_calc", 4096) == 4096 - 1024
    full = 4096
    (item,) = read_sources(["passkey"], subject, full, samples=1)
    assert item.length == full
    assert answer_example(subject, Dense(), item)["tokens"] <= full - NEW_TOKENS["passkey"]
    long = Item("passkey", full, 0, example(context="a" * 9000))
    assert answer_example(subject, Dense(), long)["tokens"] == full - NEW_TOKENS["passkey"]


@pytest.mark.parametrize(
    ("task", "fields", "why"),
    [
        ("code_debug", {"options": ("a", "b")}, "must have 4 options, got 2"),
        ("math_find", {"input": "Which one?"}, "must hold 'The"),
    ],
)
def test_an_example_that_cannot_be_asked_is_named_when_it_is_read(
    task: str, fields: dict[str, Any], why: str, tmp_path: Path, subject: Subject
) -> None:
    path = tmp_path / f"{task}.jsonl"
    path.write_text(to_line(replace(example(task), **fields)))
    with pytest.raises(ValueError, match=rf"{task}\.jsonl: .*{why}"):
        read_sources([str(path)], subject, 600)


def test_items_of_one_name_are_refused(tmp_path: Path, subject: Subject) -> None:
    items = [Item("passkey", 600, 0, example(context=text)) for text in ("a", "b")]
    with pytest.raises(ValueError, match="got 2 of the name 0 for passkey at 600 tokens"):
        run_items(subject, SPECS, items, tmp_path, answer_example, kind=KIND)


def test_generated_examples_of_another_count_are_not_taken_for_the_old_ones(
    tmp_path: Path, subject: Subject
) -> None:
    few, more = (read_sources(["passkey"], subject, 600, samples=n) for n in (3, 5))
    run_items(subject, SPECS[:1], few, tmp_path, answer_example, kind=KIND)
    with pytest.raises(ValueError, match="item 1 of passkey at 600 tokens with other content"):
        run_items(subject, SPECS[:1], more, tmp_path, answer_example, kind=KIND)


def test_a_run_goes_on_and_is_summed_up(tmp_path: Path, subject: Subject) -> None:
    items = read_sources(["passkey"], subject, 600, samples=3)
    run_items(subject, SPECS, items[:1], tmp_path, answer_example, kind=KIND)
    records = run_items(subject, SPECS, items, tmp_path, answer_example, kind=KIND)
    assert [r["index"] for r in records.of(KIND)] == [0, 0, 1, 1, 2, 2]
    head, _, dense, sparse = score_table(records.lines).splitlines()
    assert dense.startswith("| passkey | 600 | 3 | `dense` | 0.000 (0.000 to 0.000) | - | 1.000 |")
    assert "`a_shape:sink=8,local=64` | 0.000 (0.000 to 0.000) | +0.000 (" in sparse
    assert head.count("|") == sparse.count("|")
