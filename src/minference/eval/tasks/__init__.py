"""Seeded prompts with exact answers, for any length and any tokenizer; standard library only.

    sample = make_sample("multikey", 32_768, seed=7, num_questions=12, placement="spread")
    sample.text(0)                    # what the model reads before it answers question 0
    sample.matches(0, generated)      # greedy exact match
    text, spans = sample.solved()     # everything with its answers, for one teacher-forced pass

The splits "dev" and "heldout" draw words, numbers, names and text that "train" never draws, and
differ from one another in seeds. A length counts the prompt and its longest question (all of
them if spread) in whatever `measure` counts: bytes by default, which is what models/needle reads.
"""

from __future__ import annotations

from minference.errors import unknown_name
from minference.eval.tasks.counting import build_common_words, build_frequent_words
from minference.eval.tasks.draft import Builder, Measure, Order, fit
from minference.eval.tasks.key_value import build_key_value
from minference.eval.tasks.needles import Needles
from minference.eval.tasks.sample import (
    PLACEMENTS,
    SPLITS,
    Placement,
    Question,
    Sample,
    Span,
    Split,
    first_line,
)
from minference.eval.tasks.strings import build_number_string, build_passkey
from minference.eval.tasks.tracking import build_variable_tracking

__all__ = [
    "ONE_QUESTION",
    "TASKS",
    "Placement",
    "Question",
    "Sample",
    "Span",
    "Split",
    "first_line",
    "make_sample",
]

TASKS: dict[str, Builder] = {
    "single": Needles(),
    "single_noise": Needles(haystack="noise"),
    "single_uuid": Needles(values="uuid"),
    "multikey": Needles(distractors=3),
    "multivalue": Needles(values_per_key=4),
    "needle_lines": Needles(haystack="needles"),
    "uuid_lines": Needles(haystack="needles", keys="uuid", values="uuid"),
    "key_value": build_key_value,
    "variable_tracking": build_variable_tracking,
    "common_words": build_common_words,
    "frequent_words": build_frequent_words,
    "passkey": build_passkey,
    "number_string": build_number_string,
}
ONE_QUESTION = frozenset({"common_words", "frequent_words", "passkey", "number_string"})


def make_sample(
    task: str,
    length: int,
    seed: int,
    split: Split = "heldout",
    *,
    num_questions: int = 1,
    placement: Placement = "end",
    depth: float | None = None,
    measure: Measure = len,
) -> Sample:
    """Draws one sample; the same arguments give the same sample on the same Python.

    Args:
        task: a name in `TASKS`.
        length: tokens of the longest text a question reads; never exceeded, missed by little.
        seed: independent stream for each (split, task, length).
        split: "dev" to tune on, "heldout" to report, "train" for training alone.
        num_questions: questions about one context; one for the tasks in `ONE_QUESTION`.
        placement: "end" asks each question on its own, "cached" too but reads the prompt once,
            "spread" spreads them over the last thousand tokens (more if they need more).
        depth: where a fact of the first question lies, 0 to 1; drawn if None.
        measure: counts the tokens of a text; bytes of ASCII by default.

    Raises:
        ValueError: an unknown name, a bad number, or a length too short for the task.
    """
    if task not in TASKS:
        raise unknown_name("task", task, TASKS)
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    if placement not in PLACEMENTS:
        raise unknown_name("placement", placement, PLACEMENTS)
    if num_questions < 1:
        raise ValueError(f"num_questions must be at least 1, got {num_questions}")
    if num_questions > 1 and task in ONE_QUESTION:
        raise ValueError(
            f"task {task!r} has one question a prompt, got num_questions="
            f"{num_questions}; draw more seeds instead"
        )
    if depth is not None and not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth must lie in 0 to 1, got {depth}")
    order = Order(task, length, seed, split, num_questions, placement, depth)
    return fit(order, TASKS[task], measure)
