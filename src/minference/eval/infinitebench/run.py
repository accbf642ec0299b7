"""InfiniteBench under every method: sparse prefill of the prompt, greedy dense decoding, scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from minference.eval.infinitebench.files import Example, read_examples
from minference.eval.infinitebench.generate import GENERATED, generate
from minference.eval.infinitebench.prompts import NEW_TOKENS, prompt_of
from minference.eval.infinitebench.scoring import score_answer
from minference.eval.items import Item, item_table
from minference.eval.records import Record
from minference.eval.runner import Subject
from minference.eval.scoring import encode, prefill
from minference.methods import Method
from minference.model_config import token_limit

KIND = "infinitebench"


def read_sources(
    sources: Sequence[str], subject: Subject, length: int, *, samples: int | None = None
) -> list[Item]:
    """Examples of published files, and generated ones where a source names such a task.

    Args:
        sources: files, or names in `GENERATED`.
        subject: whose tokenizer counts.
        length: tokens of a prompt; longer ones lose their middle.
        samples: the first so many of each source; all of a file and 20 generated ones if None.

    Raises:
        FileNotFoundError: neither a file nor a generated task.
        ValueError: a file that is not of the published form, or examples that cannot be asked.
    """
    found, limit = [], token_limit(subject.model.config)
    for source in sources:
        if source in GENERATED and not Path(source).is_file():
            measure = subject.measure()
            most = min(length, prompt_limit(source, limit) or length)
            examples = generate(source, most, 20 if samples is None else samples, measure=measure)
        elif Path(source).is_file():
            examples = islice(read_examples(Path(source)), samples)
        else:
            raise FileNotFoundError(
                f"no InfiniteBench file at {source!r}; give a file of the benchmark, or one of "
                f"{', '.join(GENERATED)} to generate it"
            )
        found += [_item(source, example, length) for example in examples]
    if not found:
        raise ValueError(f"no example in {', '.join(sources)}")
    return found


@torch.inference_mode()
def answer_example(subject: Subject, method: Method, item: Item) -> Record:
    """Prompt, greedy answer and its score."""
    example: Example = item.content
    model, tokenizer = subject.model, subject.tokenizer
    limit = token_limit(model.config)
    length = min(item.length, prompt_limit(example.task, limit) or item.length)
    ids = cut_middle(encode(tokenizer, prompt_of(example), start=True), length)
    pass_ = prefill(
        model, method, torch.tensor(ids, device=model.device), use_cache=True, logits_to_keep=1
    )
    room = NEW_TOKENS[example.task]
    if limit is not None:
        room = min(room, limit - len(ids))
    text = tokenizer.decode(_continue(model, pass_.logits[-1], pass_.cache, room))
    return {
        "score": score_answer(example, text),
        "answer": [str(answer)[:200] for answer in example.answers[:4]],
        "got": text[:400],
        "tokens": len(ids),
        "seconds": round(pass_.seconds, 4),
        "density": pass_.layers.density,
        "recall": pass_.layers.recall,
    }


def prompt_limit(task: str, limit: int | None) -> int | None:
    """Tokens of a prompt that leave room for the answer in a model that takes `limit`: for all of
    its tokens, but at most for a quarter of the model's."""
    return None if limit is None else limit - min(NEW_TOKENS[task], limit // 4)


def cut_middle(ids: list[int], length: int) -> list[int]:
    """The first and the last half of a prompt that is longer than allowed."""
    if len(ids) <= length:
        return ids
    first = length // 2
    return ids[:first] + ids[len(ids) - (length - first) :]


def score_table(records: Iterable[Mapping[str, Any]]) -> str:
    """A row for each task, length and method; the score is the benchmark's."""
    return item_table(records, KIND, "score", "score")


def _item(source: str, example: Example, length: int) -> Item:
    """The item of an example of which both prompt and score can be told."""
    try:
        prompt_of(example)
        score_answer(example, "")
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return Item(example.task, length, example.id, example)


def _continue(model: Any, logits: torch.Tensor, cache: Any, room: int) -> torch.Tensor:  # noqa: ANN401
    """Greedy tokens up to the one that stops, which is left out."""
    stops = model.generation_config.eos_token_id
    stops = {stops} if isinstance(stops, int) else set(stops or ())
    tokens: list[int] = []
    while (best := int(logits.argmax())) not in stops:
        tokens.append(best)
        if len(tokens) == room:
            break
        step = torch.tensor([[best]], device=model.device)
        logits = model(step, past_key_values=cache, use_cache=True).logits[0, -1]
    return torch.tensor(tokens, dtype=torch.long)
