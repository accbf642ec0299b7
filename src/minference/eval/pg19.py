"""Perplexity of books: PG-19 (arXiv 1911.05507) or any folder of text files, by length.

Each book is read from its start, cut to each length, and scored at places spread evenly over it:
all of them up to `SCORED`, so that a long text needs no more memory for logits than a short one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from minference.eval.items import Item, item_table, summaries
from minference.eval.records import Record
from minference.eval.runner import Subject
from minference.eval.scoring import encode, prefill
from minference.log import get_logger
from minference.methods import Method

KIND = "perplexity"
TASK = "pg19"
SCORED = 4096


def read_books(
    folder: Path, subject: Subject, lengths: Sequence[int], *, books: int | None = None
) -> list[Item]:
    """The text files of a folder, and of folders in it, once for each length that they fill.

    Shorter books are left out at that length, so that every prompt is full.

    Args:
        folder: holds `*.txt` files in UTF-8.
        subject: whose tokenizer counts.
        lengths: tokens.
        books: take only so many, the first by name that fill the longest length they can.

    Raises:
        FileNotFoundError: no such folder, or no text file in it.
        ValueError: no book fills the shortest length, one is not UTF-8, a length is below 2 or
            books below 1.
    """
    paths = sorted(folder.rglob("*.txt"))
    if not paths:
        raise FileNotFoundError(f"no *.txt file in {str(folder)!r}; give the folder of the books")
    if min(lengths) < 2:
        raise ValueError(f"a length must be at least 2 tokens, got {min(lengths)}")
    if books is not None and books < 1:
        raise ValueError(f"books must be at least 1, got {books}; leave it out to read all")
    found: dict[int, list[Item]] = {length: [] for length in sorted(set(lengths))}
    longest = 0
    for path in paths:
        if all(len(items) == books for items in found.values()):
            break
        ids = encode(subject.tokenizer, _text_of(path), start=True)
        longest = max(longest, len(ids))
        name = path.relative_to(folder).as_posix()
        for length, items in found.items():
            if len(ids) >= length and len(items) != books:
                items.append(Item(TASK, length, name, tuple(ids[:length])))
    short = [length for length, items in found.items() if not items]
    if len(short) == len(found):
        raise ValueError(
            f"no book in {str(folder)!r} fills {min(lengths)} tokens, the longest has {longest}; "
            "ask for shorter lengths"
        )
    if short:
        get_logger(__name__).warning("no book fills %s tokens", ", ".join(map(str, short)))
    return [item for items in found.values() for item in items]


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"book {str(path)!r} must be text in UTF-8: {error}; convert it or move it elsewhere"
        ) from error


@torch.inference_mode()
def read_book(subject: Subject, method: Method, item: Item) -> Record:
    """Bits a byte and nats a token of one book under a method."""
    tokens = torch.tensor(item.content, device=subject.model.device)
    places = torch.linspace(0, len(tokens) - 2, min(SCORED, len(tokens) - 1)).round().long()
    places = places.unique().to(tokens.device)
    pass_ = prefill(subject.model, method, tokens, use_cache=False, logits_to_keep=places)
    losses = torch.nn.functional.cross_entropy(
        pass_.logits.float(), tokens[places + 1], reduction="none"
    )
    nats = float(losses.double().mean())
    size = len(subject.tokenizer.decode(tokens[1:]).encode())
    return {
        "nats": round(nats, 6),
        "bits_per_byte": round(nats / math.log(2) * (len(tokens) - 1) / max(size, 1), 6),
        "scored": len(places),
        "tokens": len(tokens),
        "seconds": round(pass_.seconds, 4),
        "density": pass_.layers.density,
        "recall": pass_.layers.recall,
    }


def perplexity_table(records: Iterable[Mapping[str, Any]]) -> str:
    """A row for each length and method: perplexity of a token, bits of a byte."""
    lines = list(records)
    nats = {(s.length, s.method): s.value.mean for s in summaries(lines, KIND, "nats")}
    perplexity = {"perplexity": lambda s: f"{math.exp(nats[s.length, s.method]):.3f}"}
    return item_table(lines, KIND, "bits_per_byte", "bits a byte", perplexity)
