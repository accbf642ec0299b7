"""Greedy exact match: an answer is right if each token of it is the most likely one.

The answers are teacher-forced. With "spread" one sparse pass over the prompt and all its solved
questions scores them all, since that pass is the prefill which is measured. With "end" the prompt
and one question are the sparse prefill, and the answer is read after it with dense attention;
"cached" is the same in chunks: the prompt once, then each question behind its cache.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import minference
from minference.eval.tasks import Sample
from minference.methods import Dense, Method

if TYPE_CHECKING:
    from minference.integrations.transformers.handle import Handle

RECALL_ROWS = 32
"""Rows of each layer, evenly spread over the prompt, of which the kept mass is measured."""
SERVE_ALL = 2.0


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
class Layers:
    """What each layer of a prefill computed and kept; 1 and 0 where it was dense.

    Attributes:
        density: share of the causal area computed.
        recall: mean share of the attention mass kept, over sampled rows and all heads.
        recall_min: that of the row and head that kept least.
        output_error: relative error of those rows' outputs, which weighs the mass with the values.
    """

    density: list[float]
    recall: list[float]
    recall_min: list[float]
    output_error: list[float]

    @classmethod
    def of(cls, records: list[dict[str, float]], layers: int) -> Layers:
        """From the records of an attached model; layers that they do not tell of, such as those
        with a window, are the host's own and count as dense."""
        found = {int(record["layer"]): record for record in records}

        def of_each(name: str, dense: float) -> list[float]:
            return [round(found.get(layer, {}).get(name, dense), 5) for layer in range(layers)]

        return cls(
            density=of_each("density", 1.0),
            recall=of_each("recall", 1.0),
            recall_min=of_each("recall_min", 1.0),
            output_error=of_each("output_error", 0.0),
        )


@dataclass(frozen=True)
class Reading:
    """One prefill and the questions that it answers; `seconds` without what measures recall."""

    outcomes: tuple[Outcome, ...]
    layers: Layers
    seconds: float
    tokens: int


@dataclass(frozen=True)
class Prefill:
    """What a forward over a prompt gave: logits of the rows asked for, the cache if asked for."""

    logits: Tensor
    cache: Any
    layers: Layers
    seconds: float


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
        method: how the prompt is attended to, however short it is, unless its `min_seq_len` says
            otherwise.
        sample: the prompt and its questions.
        skip: numbers of questions at the end that need no answer; a spread sample is read whole.
    """
    if sample.placement == "spread":
        return [_read_spread(model, tokenizer, method, sample)]
    wanted = [index for index in range(len(sample.questions)) if index not in skip]
    # what is behind a token does not change what dense attention makes of it
    if sample.placement == "cached" or (isinstance(method, Dense) and len(wanted) > 1):
        return [_read_cached(model, tokenizer, method, sample, wanted)]
    return [_read_end(model, tokenizer, method, sample, index) for index in wanted]


def encode(tokenizer: Any, text: str, *, start: bool = False) -> list[int]:  # noqa: ANN401
    """Token ids of a piece of text, after the token that starts a sequence where there is one."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if not start:
        return ids
    opening = tokenizer("").input_ids[:1]
    return [*opening, *ids] if opening == [tokenizer.bos_token_id] else ids


def prefill(
    model: Any,  # noqa: ANN401
    method: Method,
    tokens: Tensor,
    *,
    recall_rows: int = RECALL_ROWS,
    **options: Any,  # noqa: ANN401
) -> Prefill:
    """One forward over a whole prompt [L], attended to by the method alone; kept mass is measured
    on so many rows, 0 for not at all."""
    with _attached(model, method, record=True, recall_rows=recall_rows) as handle:
        began = _now(model)
        out = model(tokens[None], **options)
        seconds = _now(model) - began
    records = handle.records
    seconds -= sum(record.get("recall_seconds", 0.0) for record in records)
    layers = Layers.of(records, model.config.get_text_config(decoder=True).num_hidden_layers)
    return Prefill(out.logits[0], out.past_key_values, layers, seconds)


def spread_tokens(
    tokenizer: Any,  # noqa: ANN401
    sample: Sample,
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a spread sample with its answers, and where each of them lies: [start, stop)."""
    ids, spans = encode(tokenizer, sample.prompt, start=True), []
    for question in sample.questions:
        ids += encode(tokenizer, question.prompt)
        answer = encode(tokenizer, f" {question.answer}\n")
        spans.append((len(ids), len(ids) + len(answer)))
        ids += answer
    return ids, spans


def answer_places(spans: list[tuple[int, int]]) -> Tensor:
    """Places whose logits predict the tokens of answers: each the one before its token."""
    return torch.cat([torch.arange(start - 1, stop - 1) for start, stop in spans])


@torch.inference_mode()
def _read_spread(model: Any, tokenizer: Any, method: Method, sample: Sample) -> Reading:  # noqa: ANN401
    ids, spans = spread_tokens(tokenizer, sample)
    tokens = torch.tensor(ids, device=model.device)
    places = answer_places(spans).to(model.device)
    read = prefill(model, method, tokens, use_cache=False, logits_to_keep=places)
    best = read.logits.argmax(-1).split([z - a for a, z in spans])
    pairs = zip(best, spans, strict=True)
    outcomes = [_outcome(i, tokenizer, b, tokens[a:z]) for i, (b, (a, z)) in enumerate(pairs)]
    return Reading(tuple(outcomes), read.layers, read.seconds, len(ids))


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
    read = prefill(model, method, tokens, use_cache=True, logits_to_keep=1)
    best = _read_answer(model, read.logits, answer, read.cache)
    outcome = _outcome(index, tokenizer, best, answer)
    return Reading((outcome,), read.layers, read.seconds, len(ids))


@torch.inference_mode()
def _read_cached(
    model: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    method: Method,
    sample: Sample,
    wanted: list[int],
) -> Reading:
    ids = encode(tokenizer, sample.prompt, start=True)
    tokens = torch.tensor(ids, device=model.device)
    read = prefill(model, method, tokens, use_cache=True, logits_to_keep=1)
    outcomes = []
    for index in wanted:
        question = sample.questions[index]
        asked, answer = (
            torch.tensor(encode(tokenizer, text), device=model.device)
            for text in (question.prompt, f" {question.answer}\n")
        )
        with _attached(model, method):
            out = model(asked[None], past_key_values=read.cache, use_cache=True, logits_to_keep=1)
        best = _read_answer(model, out.logits[0], answer, read.cache)
        read.cache.crop(len(ids) - read.cache.get_seq_length())
        outcomes.append(_outcome(index, tokenizer, best, answer))
    return Reading(tuple(outcomes), read.layers, read.seconds, len(ids))


def _read_answer(model: Any, logits: Tensor, answer: Tensor, cache: Any) -> Tensor:  # noqa: ANN401
    """The most likely token at each place of an answer: the first from the logits of the token
    before it, the others read densely behind the cache."""
    best = logits.argmax(-1)
    if len(answer) == 1:
        return best
    rest = model(answer[None, :-1], past_key_values=cache, use_cache=True)
    return torch.cat([best, rest.logits[0].argmax(-1)])


def _attached(model: Any, method: Method, **options: Any) -> Handle:  # noqa: ANN401
    """The method at any length that it has no threshold of its own for, however dense it is."""
    least = method.min_seq_len or 0
    return minference.attach(model, method, min_seq_len=least, dense_from=SERVE_ALL, **options)


def _outcome(index: int, tokenizer: Any, best: Tensor, answer: Tensor) -> Outcome:  # noqa: ANN401
    return Outcome(index, bool((best == answer).all()), tokenizer.decode(best))


def _now(model: Any) -> float:  # noqa: ANN401
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
