"""What a task hands out: a prompt, its questions and the exact answers.

Standard library only, like everything in `minference.eval.tasks`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Split = Literal["train", "dev", "heldout"]
Placement = Literal["end", "spread", "cached"]
SPLITS: tuple[Split, ...] = ("train", "dev", "heldout")
PLACEMENTS: tuple[Placement, ...] = ("end", "spread", "cached")
STOP = "\n"


@dataclass(frozen=True)
class Question:
    """One question and the only answer that counts.

    Attributes:
        prompt: Text that follows the sample's prompt and stops right before the answer.
        answer: Exact answer, without surrounding white space.
        parts: Elements of a list answer, for scores that count elements.
        depth: Share of the context before the earliest needed fact, 0 to 1, None if there is none.
    """

    prompt: str
    answer: str
    parts: tuple[str, ...] = ()
    depth: float | None = None

    @property
    def solved(self) -> str:
        """The question with its answer and the newline that ends it."""
        return f"{self.prompt} {self.answer}{STOP}"


@dataclass(frozen=True)
class Span:
    """Where a question's answer lies in `Sample.solved`: characters [start, stop).

    `start` is the space before the answer and `stop` lies behind the closing newline.
    """

    question: int
    start: int
    stop: int


@dataclass(frozen=True)
class Sample:
    """A prompt of known length with its questions.

    With placement "end" each question continues `prompt` on its own; "cached" is the same for a
    prompt that is read once for all of them; with "spread" the questions follow one another, text
    between them, and a question sees the solved ones before it.
    """

    task: str
    split: Split
    seed: int
    length: int
    placement: Placement
    prompt: str
    questions: tuple[Question, ...]
    tags: dict[str, str] = field(default_factory=dict, compare=False)

    def text(self, index: int) -> str:
        """What a model reads before it answers question `index`."""
        before = self.questions[:index] if self.placement == "spread" else ()
        solved = "".join(question.solved for question in before)
        return f"{self.prompt}{solved}{self.questions[index].prompt}"

    def solved(self) -> tuple[str, tuple[Span, ...]]:
        """The prompt with every question solved, and where the answers lie.

        One teacher-forced forward over it scores all questions of a "spread" sample: an answer is
        greedy exact match if and only if every token of its span is the most likely one.
        """
        pieces, spans, at = [self.prompt], [], len(self.prompt)
        for index, question in enumerate(self.questions):
            pieces.append(question.solved)
            start = at + len(question.prompt)
            at += len(question.solved)
            spans.append(Span(index, start, at))
        return "".join(pieces), tuple(spans)

    def matches(self, index: int, generated: str) -> bool:
        """Whether a greedy continuation of `text(index)` is exactly the answer."""
        return first_line(generated) == self.questions[index].answer

    def recall(self, index: int, generated: str) -> float:
        """Share of the answer's parts found in the continuation (RULER's score)."""
        question = self.questions[index]
        parts = question.parts or (question.answer,)
        line = generated.lower()
        return sum(part.lower() in line for part in parts) / len(parts)


def first_line(generated: str) -> str:
    """The answer in a continuation: its first line without spaces and a final full stop."""
    return generated.lstrip().split(STOP, 1)[0].strip().removesuffix(".")
