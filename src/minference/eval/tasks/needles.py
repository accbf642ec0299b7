"""Needles in a haystack in RULER's form (arXiv 2404.06654): one, many, several values, lines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minference.eval.tasks.draft import Brief, Draft
from minference.eval.tasks.haystack import hide, noise, prose
from minference.eval.tasks.sample import Question

Kind = Literal["number", "uuid"]
_PLURAL: dict[Kind, str] = {"number": "numbers", "uuid": "uuids"}


@dataclass(frozen=True)
class Needles:
    """A builder of needle prompts.

    Attributes:
        haystack: "prose", "noise", or "needles" where the text is nothing but other needles.
        keys: what a key looks like; "words" is an adjective and a noun.
        values: what a value looks like.
        values_per_key: more than one asks for all of them, in the order of the text.
        distractors: needles nobody asks for, for each question.
    """

    haystack: Literal["prose", "noise", "needles"] = "prose"
    keys: Literal["words", "uuid"] = "words"
    values: Kind = "number"
    values_per_key: int = 1
    distractors: int = 0

    def __call__(self, brief: Brief) -> Draft:
        """Writes the prompt; facts are shuffled, so the order of questions says nothing."""
        asked = [self._fact(brief) for _ in range(brief.num_questions)]
        head = self._head()
        room = brief.chars - len(head)
        lines = [(i, self._line(key, value)) for i, (key, vs) in enumerate(asked) for value in vs]
        others = [
            (-1, self._line(key, vs[0]))
            for key, vs in (
                self._fact(brief) for _ in range(self.distractors * brief.num_questions)
            )
        ]
        lines += others
        if self.haystack == "needles":
            lines += self._fill(brief, room - sum(len(line) + 1 for _, line in lines))
        brief.rng.shuffle(lines)
        pinned = _pin(brief, lines)
        context = self._context(brief, room, [line for _, line in lines], pinned)
        questions = tuple(
            self._question(key, values, context) for key, values in _in_order(asked, lines)
        )
        return Draft(head + context, questions)

    def _fact(self, brief: Brief) -> tuple[str, list[str]]:
        vocabulary = brief.vocabulary
        key = vocabulary.key() if self.keys == "words" else vocabulary.uuid()
        draw = vocabulary.number if self.values == "number" else vocabulary.uuid
        return key, [draw() for _ in range(self.values_per_key)]

    def _fill(self, brief: Brief, room: int) -> list[tuple[int, str]]:
        lines: list[tuple[int, str]] = []
        while True:
            key, values = self._fact(brief)
            line = self._line(key, values[0])
            room -= len(line) + 1
            if room < 0:
                return lines
            lines.append((-1, line))

    def _context(self, brief: Brief, room: int, lines: list[str], pinned: int) -> str:
        if self.haystack == "needles":
            return "\n".join(lines) + "\n"
        room -= sum(len(line) + 2 for line in lines)
        text = noise(room) if self.haystack == "noise" else prose(brief.rng, brief.split, room)
        return hide(brief.rng, text, lines, brief.depth, pinned)

    def _head(self) -> str:
        noun = _PLURAL[self.values]
        return (
            f"Some special magic {noun} are hidden within the following text. Make sure to "
            f"memorize it. I will quiz you about the {noun} afterwards.\n"
        )

    def _line(self, key: str, value: str) -> str:
        noun = _PLURAL[self.values] if self.values_per_key > 1 else self.values
        return f"One of the special magic {noun} for {key} is: {value}."

    def _question(self, key: str, values: list[str], context: str) -> Question:
        depth = min(context.find(f"for {key} is: {value}") for value in values) / len(context)
        if self.values_per_key == 1:
            prompt = (
                f"\nWhat is the special magic {self.values} for {key} mentioned in the provided "
                f"text? The special magic {self.values} for {key} mentioned in the provided text is"
            )
        else:
            noun = _PLURAL[self.values]
            prompt = (
                f"\nWhat are all the special magic {noun} for {key} mentioned in the provided "
                f"text? The special magic {noun} for {key} mentioned in the provided text are"
            )
        return Question(prompt, ", ".join(values), tuple(values), depth)


def _pin(brief: Brief, lines: list[tuple[int, str]]) -> int:
    """Moves a line of the first question to the rank its depth gives it, and tells the rank."""
    if brief.depth is None:
        return 0
    line = lines.pop(next(at for at, (owner, _) in enumerate(lines) if owner == 0))
    rank = round(brief.depth * len(lines))
    lines.insert(rank, line)
    return rank


def _in_order(
    asked: list[tuple[str, list[str]]], lines: list[tuple[int, str]]
) -> list[tuple[str, list[str]]]:
    """Each asked key with its values in the order in which the text names them."""
    ordered = []
    for index, (key, values) in enumerate(asked):
        mine = [line for owner, line in lines if owner == index]
        rank = {value: at for at, line in enumerate(mine) for value in values if value in line}
        ordered.append((key, sorted(values, key=rank.__getitem__)))
    return ordered
