"""Scores and paired differences on numbers that can be checked by hand."""

import pytest

from minference.eval.statistics import (
    answers_by_cell,
    difference_to,
    paired_difference,
    scores,
    wilson,
)


def test_wilson_matches_a_published_value() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(10, 10)[1] == pytest.approx(1.0)


def test_equal_answers_differ_by_nothing() -> None:
    answers = {(seed, 0): bool(seed % 2) for seed in range(20)}
    found = paired_difference(answers, answers)
    assert found is not None
    assert (found.mean, found.low, found.high, found.questions) == (0, 0, 0, 20)


def test_a_loss_on_a_third_of_the_prompts_is_seen() -> None:
    dense = {(seed, index): True for seed in range(30) for index in range(2)}
    sparse = {place: place[0] % 3 != 0 for place in dense}
    found = paired_difference(sparse, dense)
    assert found is not None
    assert found.mean == pytest.approx(-1 / 3)
    assert -0.55 < found.low < -1 / 3 < found.high < -0.1
    assert paired_difference({}, dense) is None


def test_a_difference_over_cells_weighs_every_question_alike() -> None:
    first, second = ((0, 1), 0), ((1, 1), 0)
    right, wrong = {first: True, second: True}, {first: False, second: True}
    cells = {
        ("a", 1, "end", "dev"): {"dense": right, "m": wrong},
        ("b", 1, "end", "dev"): {"dense": right, "m": right, "other": wrong},
    }
    found = difference_to(cells, "m")
    assert found is not None
    assert (found.mean, found.questions) == (-0.25, 4)
    assert difference_to(cells, "other", baseline="none") is None


def test_scores_gather_densities_by_layer() -> None:
    base = {"task": "t", "length": 1, "placement": "end", "split": "dev"}
    base |= {"method": "m", "seed": 0, "questions": 2}
    lines = [
        {"record": "question", **base, "index": 0, "correct": 1},
        {"record": "question", **base, "index": 1, "correct": 0},
        {"record": "prefill", **base, "seconds": 9.0, "density": [0.1, 0.1], "recall": [0, 0]},
        {"record": "prefill", **base, "seconds": 2.0, "density": [1.0, 0.5], "recall": [1, 0.8]},
        {"record": "prefill", **base, "seed": 1, "seconds": 1.0, "density": [1.0, 0.0]},
    ]
    score = scores(lines)["t", 1, "end", "dev"]["m"]
    assert (score.accuracy, score.total, score.prompts) == (0.5, 2, 1)
    assert score.layers == (1.0, 0.25)
    assert score.density == pytest.approx(0.625)
    # of a prompt asked twice the last prefill counts, and one without recall says nothing of it
    assert score.recalls == (1.0, 0.8)
    assert score.recall == pytest.approx(0.9)


def test_prompts_of_other_splits_or_numbers_of_questions_are_other_prompts() -> None:
    base = {"record": "question", "task": "t", "length": 1, "placement": "end", "seed": 0}
    lines = [
        {**base, "split": split, "questions": questions, "index": 0, "method": method}
        | {"correct": int(method == "dense" or split == "dev")}
        for split, questions in (("dev", 1), ("heldout", 1), ("heldout", 2))
        for method in ("dense", "m")
    ]
    found = {cell[3]: methods["m"] for cell, methods in scores(lines).items()}
    assert {split: (s.accuracy, s.total, s.prompts) for split, s in found.items()} == {
        "dev": (1.0, 1, 1),
        "heldout": (0.0, 2, 2),
    }
    pooled = difference_to(answers_by_cell(lines), "m")
    assert pooled is not None
    assert (pooled.mean, pooled.questions) == (pytest.approx(-2 / 3), 3)
