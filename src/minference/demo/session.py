"""What the page does, without the page: from a filled form to what is shown, step by step."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from minference.errors import UnsupportedError
from minference.eval.runner import Subject
from minference.eval.side_by_side import (
    Answer,
    Prompt,
    answer_densely,
    answer_sparsely,
    compare,
    encode,
    hidden_fact,
)
from minference.lengths import parse_length
from minference.methods.spec import build_method, parse_method
from minference.viz.probe import Probe

NEW_TOKENS = 32
_SHOWN_CHARS, _SHOWN_LINES = 400, 3


@dataclass(frozen=True)
class Form:
    """What a visitor filled in; `text` is None for a hidden fact.

    Attributes:
        text: prompt that ends where the answer begins.
        tokens: length of the generated prompt, as 8k.
        depth: share of the generated prompt before the fact that is asked for.
        seed: facts and prose of the generated prompt.
        method: as in `minference run --method`.
        layer: layer to draw.
        head: query head to draw.
    """

    text: str | None = None
    tokens: str = "8k"
    depth: float = 0.5
    seed: int = 0
    method: str = "minference"
    layer: int = 0
    head: int = 0


@dataclass(frozen=True)
class Shown:
    """What the page shows; parts that are not there yet are None.

    Attributes:
        status: one sentence: what goes on, what came out, or what is wrong.
        question: end of the prompt, and the right answer where it is known.
        dense: the dense side.
        sparse: the sparse side.
        picture: the head's attention and the computed tiles.
        failed: whether `status` tells an error.
    """

    status: str
    question: str | None = None
    dense: Answer | None = None
    sparse: Answer | None = None
    picture: Path | None = None
    failed: bool = False


class Session:
    """One model, and what visitors ask it; one at a time, since times are measured."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._temporary = tempfile.TemporaryDirectory(prefix="minference-demo-")
        self.folder = Path(self._temporary.name)
        self._pictures = 0
        # the first call starts threads and pages the weights in
        answer_densely(subject, encode(subject, "warm up"), 1)

    def answer(self, form: Form) -> Iterator[Shown]:
        """Shows the dense side as soon as it is there, then both; bad input is one sentence."""
        try:
            yield from self._answer(form)
        except (ValueError, TypeError, FileNotFoundError, UnsupportedError) as error:
            yield Shown(f"Please mend this: {error}.", failed=True)

    def close(self) -> None:
        """Removes the folder of the pictures."""
        self._temporary.cleanup()

    def _answer(self, form: Form) -> Iterator[Shown]:
        config = self.subject.model.config
        method = build_method(parse_method(form.method), config)
        probe = Probe.of(config, form.layer, form.head)
        if form.text is None:
            tokens = parse_length(form.tokens)
            prompt = hidden_fact(self.subject, tokens, form.seed, form.depth)
        else:
            prompt = Prompt(form.text)
        ids = encode(self.subject, prompt.text, room=NEW_TOKENS)
        length = f"{ids.shape[1]:,} tokens"
        shown = Shown(f"Reading {length} with dense attention …", _question(prompt))
        yield shown
        dense = answer_densely(self.subject, ids, NEW_TOKENS)
        shown = replace(shown, status=f"Reading {length} sparsely …", dense=dense)
        yield shown
        sparse, handle = answer_sparsely(self.subject, ids, NEW_TOKENS, method, probe)
        status = _verdict(length, prompt, dense, sparse)
        shown = replace(shown, status=status, sparse=sparse)
        yield shown
        if probe.seen is not None:
            self._pictures += 1
            picture = self.folder / f"head{self._pictures}.png"
            probe.save(handle, picture)
            yield replace(shown, picture=picture)


def _question(prompt: Prompt) -> str:
    """The last lines of the prompt, and the right answer where it is known."""
    lines = prompt.text[-_SHOWN_CHARS:].split("\n")
    if prompt.expected is None:
        return "… " + "\n".join(lines[-_SHOWN_LINES:])
    return f"{lines[-1]} … (hidden: {prompt.expected})"


def _verdict(length: str, prompt: Prompt, dense: Answer, sparse: Answer) -> str:
    found = compare(dense, sparse)
    sides = {"dense": dense, "sparse": sparse}
    right = [name for name, side in sides.items() if side.text == prompt.expected]
    told = f"; right: {' and '.join(right) or 'neither'}" if prompt.expected is not None else ""
    everything = " Nothing was left out: try a longer prompt, or smaller budgets."
    return (
        f"{length}: first token after {sparse.seconds:.1f} s instead of {dense.seconds:.1f} s "
        f"({found['speedup']:.2f} times as fast), {sparse.density:.1%} of the attention computed, "
        f"{'the same answer' if found['same_answer'] else 'another answer'}{told}."
        f"{everything if sparse.density == 1 else ''}"
    )
