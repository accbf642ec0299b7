"""The published per-head layout: a list of layers, each {"head": [kind, a, b, score]}. Floor 0.

It is the layout of microsoft/MInference's config files, read and written so that files move both
ways. A score is a recall in [0, 1] or a count of wrong output elements, and informs only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

from minference.errors import PatternFileError, UnsupportedError
from minference.patterns import KEY_BLOCK, AShape, BlockSparse, Pattern, VerticalSlash

Rows: TypeAlias = tuple[tuple[Pattern, ...], ...]
Scores: TypeAlias = tuple[tuple[float | None, ...], ...]

_KINDS = ("vertical_and_slash", "stream_llm", "block_sparse")
# the published kernels keep 100 blocks whatever the file says
_PUBLISHED_TOPK = 100


def parse(data: object) -> tuple[Rows, Scores]:
    """Reads decoded JSON of the published layout.

    Returns:
        Patterns and scores, `[layer][head]`.

    Raises:
        PatternFileError: the data does not follow the layout; the message names the place.
    """
    if not isinstance(data, list) or not data:
        raise PatternFileError(
            f"expected a list with one object a layer, got {type(data).__name__} {data!r:.40}"
        )
    layers = [_parse_layer(number, layer) for number, layer in enumerate(data)]
    heads = len(layers[0])
    for number, layer in enumerate(layers):
        if len(layer) != heads:
            raise PatternFileError(f"layer {number} has {len(layer)} heads, layer 0 has {heads}")
    rows = tuple(tuple(pattern for pattern, _ in layer) for layer in layers)
    return rows, tuple(tuple(score for _, score in layer) for layer in layers)


def dump(rows: Rows, scores: Scores | None = None) -> list[dict[str, list[Any]]]:
    """Writes patterns in the published layout, as JSON-ready values; an unknown score is 0.

    Raises:
        UnsupportedError: a pattern that the layout has no name for.
    """
    return [
        {
            str(head): [*_entry(pattern, layer, head), _score_of(scores, layer, head)]
            for head, pattern in enumerate(row)
        }
        for layer, row in enumerate(rows)
    ]


def _parse_layer(number: int, layer: object) -> list[tuple[Pattern, float | None]]:
    if not isinstance(layer, dict) or not layer:
        raise PatternFileError(
            f"layer {number}: expected an object of heads, got {type(layer).__name__} {layer!r:.40}"
        )
    names = [str(head) for head in range(len(layer))]
    if set(layer) != set(names):
        odd = sorted(set(layer) - set(names))[0]
        raise PatternFileError(
            f"layer {number}: expected the heads 0 to {len(layer) - 1}, got head {odd!r}"
        )
    return [_parse_head(f"layer {number}, head {name}", layer[name]) for name in names]


def _parse_head(place: str, entry: object) -> tuple[Pattern, float | None]:
    if not isinstance(entry, Sequence) or isinstance(entry, str) or len(entry) not in (3, 4):
        raise PatternFileError(f"{place}: expected [kind, a, b, score], got {entry!r:.60}")
    kind, a, b = entry[:3]
    try:
        pattern = _pattern(kind, a, b)
    except (TypeError, ValueError) as error:
        raise PatternFileError(f"{place}: {error}") from error
    score = entry[3] if len(entry) == 4 else None
    if score is None:
        return pattern, None
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise PatternFileError(f"{place}: expected a finite score, got {score!r}")
    return pattern, score


def _pattern(kind: object, a: Any, b: Any) -> Pattern:  # noqa: ANN401
    match kind:
        case "vertical_and_slash":
            return VerticalSlash(a, b)
        case "stream_llm":
            return AShape(a, b)
        case "block_sparse":
            ours = isinstance(b, int) and b >= KEY_BLOCK and b % KEY_BLOCK == 0
            return BlockSparse(a, b) if ours else BlockSparse(_PUBLISHED_TOPK)
        case _:
            raise ValueError(f"unknown kind {kind!r}: valid kinds are {', '.join(_KINDS)}")


def _entry(pattern: Pattern, layer: int, head: int) -> list[Any]:
    match pattern:
        case VerticalSlash(vertical, slash):
            return ["vertical_and_slash", vertical, slash]
        case AShape(sink, local):
            return ["stream_llm", sink, local]
        case BlockSparse(topk, block):
            return ["block_sparse", topk, block]
        case _:
            raise UnsupportedError(
                f"layer {layer}, head {head}: the published layout holds {', '.join(_KINDS)}, "
                f"not {pattern.kind}; HeadPatterns.save writes a file that holds every pattern"
            )


def _score_of(scores: Scores | None, layer: int, head: int) -> float:
    score = None if scores is None else scores[layer][head]
    return 0 if score is None else score
