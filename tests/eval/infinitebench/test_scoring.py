"""The published scores on answers whose score follows from the rules by hand.

The rules were also compared with the published functions on 12,000 random answers a task, and
ROUGE-Lsum with the package rouge_score on 600 pairs: no difference.
"""

from typing import Any

import pytest

from minference.eval.infinitebench.files import TASKS, Example
from minference.eval.infinitebench.scoring import rouge_lsum, score_answer, token_f1

NAMES = ("load", "Model.save", "parse", "main")
TEXTS = ("In Rome.", "By train", "He left", "Never")


def example(task: str, answers: tuple[Any, ...], options: tuple[str, ...] = ()) -> Example:
    return Example(task, 0, "", "", answers, options)


@pytest.mark.parametrize(
    ("task", "answers", "text", "score"),
    [
        ("passkey", ("71432",), " 71432. Remember", 1),
        ("passkey", ("71432",), " 7143", 0),
        ("passkey", ("71432",), "1 71432", 0),
        ("passkey", ("71432",), "", 0),
        ("number_string", ("0012",), "is 0012", 1),
        ("kv_retrieval", ("ab-1",), ' "ab-1"}, "c": "d"', 1),
        ("kv_retrieval", ("ab-1",), "ab-12", 0),
        ("code_run", (-4,), "it returns -4.", 1),
        ("code_run", ("-4",), "-4\n", 1),
        ("code_run", (4,), "4 is it", 0),
        ("code_run", (4,), " ", 0),
        ("math_find", (12,), "The number is 12.7", 1),
        ("math_find", (12.5,), "12.5", 1),
        ("math_find", (12.5,), "12", 0),
        ("math_find", ("12",), "12", 1),
        ("math_find", (12,), "twelve", 0),
        ("math_calc", (1, 4, 8, 2), "[1, 4, 9, 2]", 0.5),
        ("math_calc", (1, 4), "", 0),
        ("longdialogue_qa_eng", ("JOHN",), ' "John", I think', 1),
        ("longdialogue_qa_eng", ("JOHN",), "Johnny", 0),
        ("longbook_qa_eng", ("the cat", "A dog"), "An old dog!", 2 / 3),
        ("longbook_qa_eng", ("the cat",), "dog", 0),
        ("longbook_qa_chn", ("北京市",), "北京。", 0.8),
        ("longbook_sum_eng", ("a b\nc d",), "a b\nc d", 1),
    ],
)
def test_scores_by_hand(task: str, answers: tuple[Any, ...], text: str, score: float) -> None:
    assert score_answer(example(task, answers), text) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (" B. Model.save", 1),
        ("B: it", 1),
        ("B", 0),
        ("A. load", 0),
        ("The answer is: Option B", 1),
        ("The answer is: `Model.save`", 1),
        ("The answer is: load, or B", 0),
        ("The answer is:", 0),
        ("", 0),
    ],
)
def test_debugging_wants_the_letter_or_the_function(text: str, score: float) -> None:
    assert score_answer(example("code_debug", ("Model.save",), NAMES), text) == score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("C", 1),
        ("Cannot say", 1),
        ("He left", 1),
        ("A. C", 0),
        ("the answer is C", 1),
        ("the answer is: He left.", 1),
        ("the answer is B, not C", 0),
        ("i guess C then", 1),
        ("i guess not", 0),
        ("  ", 0),
    ],
)
def test_a_choice_takes_the_first_letter(text: str, score: float) -> None:
    assert score_answer(example("longbook_choice_eng", ("He left",), TEXTS), text) == score


def test_an_answer_may_come_with_its_letter() -> None:
    assert score_answer(example("code_debug", ("f", "D")), "D. f") == 1
    with pytest.raises(ValueError, match="must be one of its options"):
        score_answer(example("code_debug", ("f",), NAMES), "D.")


def test_token_f1_counts_repetitions() -> None:
    assert token_f1(["a", "a", "b"], ["a", "b", "b"]) == pytest.approx(2 / 3)


def test_rouge_lsum_unites_lines() -> None:
    # "the cat sat" finds {the, cat} in one line and {sat} in the other: 3 of 3, and 3 of 5 said
    assert rouge_lsum("the cat ran\nit sat", "The cat sat.") == pytest.approx(0.75)
    # order counts within a line: the longest common subsequence of "a b c" and "c b a" is 1 long
    assert rouge_lsum("c b a", "a b c") == pytest.approx(1 / 3)
    assert rouge_lsum("", "a") == 0


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_rule(task: str) -> None:
    assert 0 <= score_answer(example(task, (1,), ("1", "2", "3", "4")), "x") <= 1


def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="passkey"):
        score_answer(example("pass", ("1",)), "1")
