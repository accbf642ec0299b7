"""What a task family writes, and how a draft becomes a sample of an exact length.

A builder is a plain function from a `Brief` to a `Draft`; `fit` calls it again, with the same
random stream, until the text is as long as asked in the caller's tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from minference.eval.tasks.haystack import prose
from minference.eval.tasks.sample import Placement, Question, Sample, Split
from minference.eval.tasks.vocabulary import Vocabulary

Measure = Callable[[str], int]
_TAIL_TOKENS = 1000
_STEPS = 8
_NEAR = 64
"""A text is near the length asked for if less than one part in so many is missing."""


@dataclass(frozen=True)
class Brief:
    """What a builder is told: how long, how many questions, and where to draw from."""

    rng: Random
    vocabulary: Vocabulary
    split: Split
    chars: int
    num_questions: int
    depth: float | None = None


@dataclass(frozen=True)
class Draft:
    """A prompt of about `Brief.chars` characters and its questions, not yet placed."""

    prompt: str
    questions: tuple[Question, ...]


Builder = Callable[[Brief], Draft]


@dataclass(frozen=True)
class Order:
    """Everything that determines a sample, but for the text of this Python."""

    task: str
    length: int
    seed: int
    split: Split
    num_questions: int
    placement: Placement
    depth: float | None = None


@dataclass(frozen=True)
class _Try:
    """A sample of so many characters asked for, the size of its longest text, and its tokens."""

    chars: int
    size: int
    tokens: int
    sample: Sample


def fit(order: Order, build: Builder, measure: Measure) -> Sample:
    """Builds a sample whose longest text is as long as asked, and never longer.

    Raises:
        ValueError: not even the smallest prompt of this task fits into the length.
    """
    probe = prose(Random(0), order.split, 2000)
    per_char = max(measure(probe), 1) / len(probe)
    chars = int(order.length / per_char)
    tried: list[_Try] = []
    for attempt in range(_STEPS):
        found = _try(order, build, measure, chars, per_char)
        tried.append(found)
        gap = order.length - found.tokens
        if 0 <= gap <= order.length // 512:
            return found.sample
        # the task's text may hold more or fewer tokens a character than prose does; a text that
        # is too long steps back further each time, since lines and pairs come in lumps
        per_token = found.size / max(found.tokens, 1)
        chars += int((gap if gap > 0 else (attempt + 1) * (gap - 8)) * per_token)
        if chars <= 0:
            break
    # where no step came near, halve what is left between a text that fits and one that does not
    for _ in range(_STEPS):
        fitting = [own for own in tried if own.tokens <= order.length]
        if order.length - max((own.tokens for own in fitting), default=0) <= order.length // _NEAR:
            break
        low = max((own.chars for own in fitting), default=0)
        high = min((own.chars for own in tried if own.chars > low), default=low)
        if high - low < 2:
            break
        tried.append(_try(order, build, measure, (low + high) // 2, per_char))
    fitting = [own for own in tried if own.tokens <= order.length]
    if not fitting:
        raise ValueError(
            f"task {order.task!r} with {order.num_questions} questions does not fit into length "
            f"{order.length}: its shortest prompt found has {min(own.tokens for own in tried)} "
            "tokens; ask for a longer prompt or fewer questions"
        )
    return max(fitting, key=lambda own: own.tokens).sample


def _try(order: Order, build: Builder, measure: Measure, chars: int, per_char: float) -> _Try:
    sample = _place(order, build, chars, per_char)
    text = _longest(sample)
    return _Try(chars, len(text), measure(text), sample)


def _place(order: Order, build: Builder, chars: int, per_char: float) -> Sample:
    rng = Random(f"{order.split}/{order.task}/{order.length}/{order.seed}")
    brief = Brief(
        rng, Vocabulary(rng, order.split), order.split, chars, order.num_questions, order.depth
    )
    draft = build(brief)
    questions = draft.questions
    if order.placement == "spread":
        questions = _spread(brief, questions, int(min(_TAIL_TOKENS, order.length // 4) / per_char))
    return Sample(
        order.task,
        order.split,
        order.seed,
        order.length,
        order.placement,
        draft.prompt,
        questions,
    )


def _spread(brief: Brief, questions: tuple[Question, ...], tail: int) -> tuple[Question, ...]:
    """Puts text between questions so that together they cover the last `tail` characters."""
    room = tail - sum(len(question.solved) for question in questions)
    filler = prose(brief.rng, brief.split, max(room, 0) // len(questions))
    size = len(filler)
    placed = []
    for question in questions:
        between = prose(brief.rng, brief.split, size).strip() if size > 1 else ""
        prompt = f"{between}\n{question.prompt.lstrip()}" if between else question.prompt
        placed.append(replace(question, prompt=prompt))
    return tuple(placed)


def _longest(sample: Sample) -> str:
    if sample.placement == "spread":
        return sample.text(len(sample.questions) - 1)
    return sample.prompt + max((question.prompt for question in sample.questions), key=len)
