"""Every task keeps its length, its seed and its answers."""

from __future__ import annotations

import re

import pytest

from minference.eval.tasks import ONE_QUESTION, TASKS, first_line, make_sample

MANY = sorted(set(TASKS) - ONE_QUESTION)


def words_and_marks(text: str) -> int:
    """Counts tokens as a word-level tokenizer would."""
    return len(re.findall(r"\w+|[^\w\s]", text))


@pytest.mark.parametrize("task", sorted(TASKS))
@pytest.mark.parametrize("length", [2048, 5000])
def test_make_sample_fills_the_length_and_never_exceeds_it(task: str, length: int) -> None:
    sample = make_sample(task, length, seed=3)
    tokens = len(sample.text(0))
    assert length - 130 <= tokens <= length
    assert sample.text(0).startswith(sample.prompt)


@pytest.mark.parametrize("task", sorted(TASKS))
def test_make_sample_counts_in_the_callers_tokens(task: str) -> None:
    for length, seed in ((1500, 1), (4000, 0), (4000, 1), (4000, 2)):
        sample = make_sample(task, length, seed=seed, measure=words_and_marks)
        assert 63 / 64 * length - 1 <= words_and_marks(sample.text(0)) <= length


@pytest.mark.parametrize("task", MANY)
def test_spread_questions_together_end_at_the_length(task: str) -> None:
    sample = make_sample(task, 12_000, seed=2, num_questions=12, placement="spread")
    assert 11_700 <= len(sample.text(11)) <= 12_000
    first = len(sample.text(0)) - len(sample.questions[0].prompt)
    assert len(sample.text(11)) - first >= 950


@pytest.mark.parametrize("task", sorted(TASKS))
def test_the_same_seed_gives_the_same_sample(task: str) -> None:
    assert make_sample(task, 3000, seed=5) == make_sample(task, 3000, seed=5)
    assert make_sample(task, 3000, seed=5).prompt != make_sample(task, 3000, seed=6).prompt
    assert make_sample(task, 3000, seed=5, split="dev") != make_sample(task, 3000, seed=5)


@pytest.mark.parametrize("task", sorted(TASKS))
def test_solved_spans_hold_the_answers(task: str) -> None:
    several = {} if task in ONE_QUESTION else {"num_questions": 3}
    for placement in ("end", "spread"):
        sample = make_sample(task, 8000, seed=4, placement=placement, **several)
        text, spans = sample.solved()
        for span, question in zip(spans, sample.questions, strict=True):
            assert text[span.start : span.stop] == f" {question.answer}\n"
            assert sample.matches(span.question, text[span.start :])
            assert sample.recall(span.question, text[span.start : span.stop]) == 1.0
            assert not sample.matches(span.question, " nothing")


def test_spread_questions_see_the_solved_ones_before_them() -> None:
    sample = make_sample("multikey", 6000, seed=0, num_questions=3, placement="spread")
    text, spans = sample.solved()
    assert [sample.text(index) for index in range(3)] == [text[: span.start] for span in spans]


@pytest.mark.parametrize(
    ("text", "line"), [(" 12\n34", "12"), ("\n 12.", "12"), ("a, b.\n", "a, b"), ("", "")]
)
def test_first_line(text: str, line: str) -> None:
    assert first_line(text) == line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "singel"}, "did you mean 'single'"),
        ({"split": "test"}, "unknown split"),
        ({"placement": "middle"}, "unknown placement"),
        ({"num_questions": 0}, "at least 1"),
        ({"task": "passkey", "num_questions": 2}, "one question a prompt"),
        ({"depth": 1.5}, "depth must lie"),
        ({"length": 100}, "does not fit into length 100"),
    ],
)
def test_bad_requests_are_refused(arguments: dict[str, object], message: str) -> None:
    request = {"task": "single", "length": 2000, "seed": 0} | arguments
    with pytest.raises(ValueError, match=message):
        make_sample(**request)
