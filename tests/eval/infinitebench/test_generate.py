"""The three retrieval tasks written locally: published form, exact lengths, keys at all depths."""

import json
import re

import pytest

from minference.eval.infinitebench.generate import GENERATED, generate
from minference.eval.infinitebench.prompts import prompt_of
from minference.eval.infinitebench.scoring import score_answer


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("task", GENERATED)
@pytest.mark.parametrize(("measure", "length"), [(len, 3000), (words, 700)])
def test_prompts_fill_the_length_and_never_more(task: str, measure, length: int) -> None:  # noqa: ANN001
    found = list(generate(task, length, 4, measure=measure))
    sizes = [measure(prompt_of(example)) for example in found]
    assert all(0.9 * length < size <= length for size in sizes)
    assert [score_answer(e, f" {e.answers[0]}.") for e in found] == [1.0] * 4
    assert found == list(generate(task, length, 4, measure=measure))
    assert found != list(generate(task, length, 4, measure=measure, seed=1))


@pytest.mark.parametrize("task", ["passkey", "number_string"])
def test_keys_lie_from_the_start_to_the_end(task: str) -> None:
    found = list(generate(task, 3000, 5))
    depths = [e.context.index(e.answers[0]) / len(e.context) for e in found]
    assert depths == sorted(depths)
    assert depths[0] < 0.02
    assert depths[-1] > 0.95
    assert all(e.context.count(e.answers[0]) == 2 for e in found)


def test_a_number_string_has_ten_digits_five_of_them_repeated() -> None:
    for example in generate("number_string", 2000, 6):
        runs = [len(run[0]) for run in re.finditer(r"(.)\1*", example.answers[0])]
        assert sum(runs) == 10
        assert len(runs) <= 5


def test_key_value_contexts_are_json() -> None:
    for example in generate("kv_retrieval", 2000, 3):
        pairs = json.loads(example.context.removeprefix("JSON data:\n"))
        key = re.search(r'"(.*)"', example.input)
        assert key is not None
        assert pairs[key[1]] == example.answers[0]


def test_what_cannot_be_generated() -> None:
    with pytest.raises(ValueError, match="kv_retrieval"):
        generate("math_find", 2000, 1)
    with pytest.raises(ValueError, match="asked for at most 100"):
        list(generate("passkey", 100, 1))
