"""What each family hides is what its questions ask for."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from minference.eval.tasks import make_sample


@pytest.mark.parametrize(
    "task", ["single", "single_noise", "single_uuid", "multikey", "multivalue", "needle_lines"]
)
def test_needles_name_the_values_in_the_order_of_the_text(task: str) -> None:
    sample = make_sample(task, 9000, seed=7, num_questions=3)
    for question in sample.questions:
        key = re.search(r" for (\S+) mentioned", question.prompt)
        assert key is not None
        hidden = re.findall(
            rf"One of the special magic \w+ for {key[1]} is: (\S+)\.", sample.prompt
        )
        assert question.answer == ", ".join(hidden)
        assert question.parts == tuple(hidden)
        assert len(hidden) == (4 if task == "multivalue" else 1)


def test_multikey_hides_three_distractors_for_each_needle() -> None:
    sample = make_sample("multikey", 9000, seed=7, num_questions=5)
    assert sample.prompt.count("One of the special magic numbers") == 0
    assert sample.prompt.count("One of the special magic number for ") == 20


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize(
    "task", ["single", "passkey", "multikey", "needle_lines", "variable_tracking", "key_value"]
)
def test_depth_places_a_fact_of_the_first_question(task: str, depth: float) -> None:
    sample = make_sample(task, 20_000, seed=1, depth=depth)
    assert sample.questions[0].depth == pytest.approx(depth, abs=0.03)


def test_key_value_is_json_that_holds_the_answers() -> None:
    sample = make_sample("key_value", 9000, seed=2, num_questions=6)
    pairs = json.loads(sample.prompt[sample.prompt.index("{") :])
    for question in sample.questions:
        key = re.search(r'Key: "(\S+)"', question.prompt)
        assert key is not None
        assert pairs[key[1]] == question.answer


def test_variable_tracking_answers_follow_the_assignments() -> None:
    sample = make_sample("variable_tracking", 9000, seed=2, num_questions=4)
    values: dict[str, str] = {}
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\n", sample.prompt):
        values[name] = values.get(source, source)
    for question in sample.questions:
        asked = re.search(r"value (\d+) in the text", question.prompt)
        assert asked is not None
        holders = [name for name, value in values.items() if value == asked[1]]
        assert question.answer == " ".join(holders)
        assert len(holders) == 5


def test_common_words_are_the_ten_most_common() -> None:
    sample = make_sample("common_words", 30_000, seed=2)
    counts = Counter(re.findall(r"\d+\. (\w+)", sample.prompt))
    common = {word for word, count in counts.items() if count == 30}
    assert set(sample.questions[0].parts) == common
    assert len(common) == 10
    assert {count for word, count in counts.items() if word not in common} == {3}


def test_frequent_words_are_the_three_most_frequent() -> None:
    sample = make_sample("frequent_words", 8000, seed=2)
    coded = sample.prompt.split("coded words. ")[-1].split()
    top = [word for word, _ in Counter(coded).most_common(4) if word != "...."][:3]
    assert sample.questions[0].answer == ", ".join(top)


@pytest.mark.parametrize(
    ("task", "fact"), [("passkey", "The pass key is"), ("number_string", "sequence of digits is")]
)
def test_strings_are_hidden_once(task: str, fact: str) -> None:
    sample = make_sample(task, 8000, seed=2)
    assert re.findall(rf"{fact} (\d+)\. Remember", sample.prompt) == [sample.questions[0].answer]
