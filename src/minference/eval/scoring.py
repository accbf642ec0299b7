"""Greedy exact match: an answer is right if each token of it is the most likely one.

The answers are teacher-forced. With "spread" one sparse pass over the prompt and all its solved
questions scores them all, since that pass is the prefill which is measured. With "end" the prompt
and one question are the sparse prefill, and the answer is read after it with dense attention.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minference.eval.attention import attending
from minference.eval.tasks import Sample
from minference.methods import Method


@dataclass(frozen=True)
class Outcome:
    """What a model made of one question.

    Attributes:
        index: number of the question.
        correct: every token of the answer, closing newline included, was the most likely one.
        got: the most likely tokens at the answer's places, as text.
    """

    index: int
    correct: bool
    got: str


@dataclass(frozen=True)
class Reading:
    """One sparse prefill and the questions that it answers."""

    outcomes: tuple[Outcome, ...]
    density: list[float]
    seconds: float
    tokens: int


def read_sample(
    model: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    method: Method,
    sample: Sample,
    *,
    skip: frozenset[int] = frozenset(),
) -> list[Reading]:
    """Every question of a sample, but for those to skip.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer; a prompt is encoded as it is, without a chat template.
        method: how the prompt is attended to.
        sample: the prompt and its questions.
        skip: numbers of questions at the end that need no answer; a spread sample is read whole.
    """
    if sample.placement == "spread":
        return [_read_spread(model, tokenizer, method, sample)]
    wanted = (index for index in range(len(sample.questions)) if index not in skip)
    return [_read_end(model, tokenizer, method, sample, index) for index in wanted]


def encode(tokenizer: Any, text: str, *, start: bool = False) -> list[int]:  # noqa: ANN401
    """Token ids of a piece of text, after the token that starts a sequence where there is one."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if not start:
        return ids
    opening = tokenizer("").input_ids[:1]
    return [*opening, *ids] if opening == [tokenizer.bos_token_id] else ids


@torch.inference_mode()
def _read_spread(model: Any, tokenizer: Any, method: Method, sample: Sample) -> Reading:  # noqa: ANN401
    ids = encode(tokenizer, sample.prompt, start=True)
    spans = []
    for question in sample.questions:
        ids += encode(tokenizer, question.prompt)
        answer = encode(tokenizer, f" {question.answer}\n")
        spans.append((len(ids), len(ids) + len(answer)))
        ids += answer
    tokens = torch.tensor(ids, device=model.device)
    places = torch.cat([torch.arange(a - 1, z - 1, device=model.device) for a, z in spans])
    with attending(model, method) as recorder:
        began = _now(model)
        logits = model(tokens[None], use_cache=False, logits_to_keep=places).logits[0]
        seconds = _now(model) - began
    best = logits.argmax(-1).split([z - a for a, z in spans])
    pairs = zip(best, spans, strict=True)
    outcomes = [_outcome(i, tokenizer, b, tokens[a:z]) for i, (b, (a, z)) in enumerate(pairs)]
    density = recorder.densities(model.config.get_text_config().num_hidden_layers)
    return Reading(tuple(outcomes), density, seconds, len(ids))


@torch.inference_mode()
def _read_end(
    model: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    method: Method,
    sample: Sample,
    index: int,
) -> Reading:
    question = sample.questions[index]
    ids = encode(tokenizer, sample.prompt, start=True) + encode(tokenizer, question.prompt)
    answer = torch.tensor(encode(tokenizer, f" {question.answer}\n"), device=model.device)
    tokens = torch.tensor(ids, device=model.device)
    with attending(model, method) as recorder:
        began = _now(model)
        prefill = model(tokens[None], use_cache=True, logits_to_keep=1)
        seconds = _now(model) - began
    best = prefill.logits[0].argmax(-1)
    if len(answer) > 1:
        rest = model(answer[None, :-1], past_key_values=prefill.past_key_values, use_cache=True)
        best = torch.cat([best, rest.logits[0].argmax(-1)])
    density = recorder.densities(model.config.get_text_config().num_hidden_layers)
    return Reading((_outcome(index, tokenizer, best, answer),), density, seconds, len(ids))


def _outcome(index: int, tokenizer: Any, best: Tensor, answer: Tensor) -> Outcome:  # noqa: ANN401
    return Outcome(index, bool((best == answer).all()), tokenizer.decode(best))


def _now(model: Any) -> float:  # noqa: ANN401
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
