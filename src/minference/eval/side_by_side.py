"""A prompt that a model answers, dense and sparse side by side: time, density and answer.

What `minference run` prints and `minference demo` shows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import minference
from minference.eval.runner import Subject
from minference.eval.tasks import make_sample
from minference.model_config import token_limit

if TYPE_CHECKING:
    from minference.integrations.transformers.handle import Handle
    from minference.methods.base import Context, Method

Observer = Callable[["Context", Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class Prompt:
    """A text to continue, and the right answer where it is known."""

    text: str
    expected: str | None = None


@dataclass(frozen=True)
class Answer:
    """What came of one prefill.

    Attributes:
        text: first line of the greedy continuation.
        seconds: time to the first token.
        logits: of the first token, [1, V].
        layers: density of each layer; None for the dense side.
    """

    text: str
    seconds: float
    logits: Tensor
    layers: tuple[float, ...] | None = None

    @property
    def density(self) -> float:
        """Mean over the layers."""
        return 1.0 if self.layers is None else sum(self.layers) / len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """What is reported of it."""
        found: dict[str, Any] = {"seconds": self.seconds, "answer": self.text}
        if self.layers is not None:
            found |= {"layers": list(self.layers), "density": self.density}
        return found


def hidden_fact(subject: Subject, tokens: int, seed: int = 0, depth: float | None = None) -> Prompt:
    """A question about one of several facts hidden in Python's documentation.

    Args:
        subject: the model; `tokens` are its tokenizer's.
        tokens: length of the prompt, without a token that starts every sequence.
        seed: facts, prose and, unless `depth` is given, their places.
        depth: share of the text before the fact that is asked for.

    Raises:
        ValueError: more tokens than the model takes, or too few for the facts.
    """
    check_length(subject.model.config, tokens)
    sample = make_sample("multikey", tokens, seed, depth=depth, measure=subject.measure())
    return Prompt(sample.text(0), sample.questions[0].answer)


def encode(subject: Subject, text: str, room: int = 0) -> Tensor:
    """Token ids [1, L] on the model's device.

    Args:
        subject: the model.
        text: the prompt.
        room: tokens to generate after it.

    Raises:
        ValueError: no text, or more than the model takes.
    """
    check_text(text)
    ids = subject.tokenizer(text, return_tensors="pt").input_ids.to(subject.model.device)
    check_length(subject.model.config, ids.shape[1] + room)
    return ids


def answer_densely(subject: Subject, ids: Tensor, max_new_tokens: int) -> Answer:
    """The prompt's answer by the host's dense attention."""
    subject.model.set_attn_implementation("sdpa")
    return _answer(subject, ids, max_new_tokens)


def answer_sparsely(
    subject: Subject,
    ids: Tensor,
    max_new_tokens: int,
    method: Method,
    observe: Observer | None = None,
) -> tuple[Answer, Handle]:
    """The prompt's answer by a method, and the detached handle, which tells of its layers.

    Args:
        subject: the model; it is left as `answer_densely` leaves it.
        ids: the prompt, [1, L].
        max_new_tokens: length of the answer.
        method: what serves the prefill.
        observe: as in `minference.attach`.
    """
    subject.model.set_attn_implementation("sdpa")
    with minference.attach(subject.model, method, record=True, observe=observe) as handle:
        found = _answer(subject, ids, max_new_tokens)
    layers = tuple(round(record["density"], 4) for record in handle.records) or (1.0,)
    return Answer(found.text, found.seconds, found.logits, layers), handle


def compare(dense: Answer, sparse: Answer) -> dict[str, Any]:
    """How much sooner the sparse answer began, and whether it is the dense one."""
    return {
        "speedup": dense.seconds / sparse.seconds,
        "same_answer": dense.text == sparse.text,
        "max_logit_difference": float((dense.logits - sparse.logits).abs().max()),
    }


def check_text(text: str) -> None:
    """Raises ValueError for a prompt without any text."""
    if not text.strip():
        raise ValueError("the prompt is empty; give some text that ends where the answer begins")


def check_length(config: Any, tokens: int) -> None:  # noqa: ANN401
    """Raises ValueError for more tokens than a model of this configuration takes."""
    limit = token_limit(config)
    if limit is not None and tokens > limit:
        raise ValueError(
            f"prompt and answer have {tokens} tokens, the model takes {limit}; shorten the prompt"
        )


def _answer(subject: Subject, ids: Tensor, max_new_tokens: int) -> Answer:
    model = subject.model
    stops = model.generation_config.eos_token_id
    stops = {stops} if isinstance(stops, int) else set(stops or ())
    with torch.inference_mode():
        if model.device.type == "cuda":
            # kernels are compiled and workspaces allocated by the first prefill of a length
            model(ids, use_cache=False, logits_to_keep=1)
        begin = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(dim=-1, keepdim=True)
        tokens = [int(token)]
        seconds = time.perf_counter() - begin
        cache = out.past_key_values
        while len(tokens) < max_new_tokens and tokens[-1] not in stops:
            token = (
                model(token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, True)
            )
            tokens.append(int(token))
    text = subject.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    text = text.split("\n")[0].strip()
    return Answer(text, seconds, out.logits[:, -1].float())
