"""The text that hides the facts: real prose and code of this Python, or repeated noise.

Prose is CPython's language reference (`pydoc_data.topics`), code is the standard library's source.
A CRC of each document's name keeps one in eight out of training, whatever the Python version; the
texts themselves belong to the Python that runs, so samples are compared on one machine.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from random import Random

from minference.errors import UnsupportedError
from minference.eval.tasks.sample import Split
from minference.eval.tasks.vocabulary import is_held_out

NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
)
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
_LARGEST = 24_000


def prose(rng: Random, split: Split, chars: int) -> str:
    """So many characters of real text, documents in random order, cut at the end.

    A long document gives a window of at most 24,000 characters. When the half is used up its
    documents come again in another order.
    """
    texts = documents(held_out=split != "train")
    pieces: list[str] = []
    missing = chars
    while missing > 0:
        for text in rng.sample(texts, len(texts)):
            start = rng.randrange(max(1, len(text) - _LARGEST))
            piece = text[start : start + min(_LARGEST, missing - 1)].lstrip() + "\n"
            pieces.append(piece[:missing])
            missing -= len(pieces[-1])
            if missing <= 0:
                break
    return "".join(pieces)


def noise(chars: int) -> str:
    """So many characters of the pass-key test's noise, whole lines where they fit."""
    repeated = NOISE * (chars // len(NOISE) + 1)
    return repeated[:chars]


def hide(
    rng: Random, text: str, facts: list[str], depth: float | None = None, pinned: int = 0
) -> str:
    """Inserts facts as lines of their own, in order, at line starts spread over a text.

    Args:
        rng: draws the places.
        text: the haystack.
        facts: lines to hide, without line ends.
        depth: where the pinned fact goes, as a share of the text; drawn if None.
        pinned: index of that fact; those before it go before it.
    """
    if depth is None:
        places = sorted(rng.random() for _ in facts)
    else:
        before = sorted(rng.uniform(0.0, depth) for _ in range(pinned))
        behind = sorted(rng.uniform(depth, 1.0) for _ in facts[pinned + 1 :])
        places = [*before, depth, *behind]
    pieces, at = [], 0
    for place, fact in zip(places, facts, strict=True):
        start = max(at, _line_start(text, int(place * len(text))))
        pieces += [text[at:start], "" if _ends_line(text, start) else "\n", fact, "\n"]
        at = start
    pieces.append(text[at:])
    return "".join(pieces)


def documents(*, held_out: bool) -> list[str]:
    """Every document of one half, as ASCII with plain line ends.

    Raises:
        UnsupportedError: this Python came without its topics and its sources.
    """
    halves = _documents()
    found = list(halves[held_out])
    if not found:
        raise UnsupportedError(
            "no text for the haystack: expected pydoc_data.topics or the standard library's "
            "source files, found neither; run on a CPython that ships its .py files"
        )
    return found


@cache
def _documents() -> tuple[tuple[str, ...], tuple[str, ...]]:
    halves: tuple[list[str], list[str]] = ([], [])
    for name, text in (*_topics(), *_sources()):
        plain = text.encode("ascii", "ignore").decode().replace("\r", "").strip()
        if len(plain) > 400:
            halves[is_held_out(name)].append(plain)
    # some topics have several names: a text that any training name has is a training text
    known = set(halves[0])
    return tuple(halves[0]), tuple(text for text in halves[1] if text not in known)


def _topics() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name in sorted(topics):
        yield f"topic/{name}", topics[name]


def _sources() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED.isdisjoint(relative.parts) and relative.parts[0] != "pydoc_data":
            yield relative.as_posix(), path.read_text(encoding="utf-8", errors="ignore")


def _line_start(text: str, at: int) -> int:
    """The first line start at or behind a place, or the place itself if it is far away."""
    if at == 0:
        return 0
    found = text.find("\n", at - 1, at + 400)
    return found + 1 if found >= 0 else min(at, len(text))


def _ends_line(text: str, at: int) -> bool:
    return at == 0 or text[at - 1] == "\n"
