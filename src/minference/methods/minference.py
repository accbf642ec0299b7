"""MInference 1.0: a searched pattern for each head, its lines or blocks estimated from the prompt
(arXiv 2407.02490)."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

from torch import Tensor

from minference.errors import UnsupportedError, unknown_name
from minference.head_patterns import HeadPatterns
from minference.index import BLOCK, SparseIndex, merge_heads
from minference.methods.base import Context, Method
from minference.ops.build import (
    a_shape_index,
    assemble,
    dense_index,
    tri_shape_index,
)
from minference.ops.estimate.api import last_query_lines
from minference.ops.lines.api import best_lines
from minference.ops.pool.api import pooled_block_lists
from minference.ops.select.api import LOCAL_BAND, SINK_COLUMNS, select_columns
from minference.ops.select.lists import local_offsets, offset_budget, select_distances
from minference.patterns import AShape, BlockSparse, Dense, Pattern, TriShape, VerticalSlash

SELECTIONS = ("budget", "lines")


@dataclass(frozen=True, kw_only=True)
class MInference(Method):
    """Per-head patterns, found offline; columns, slashes and blocks, estimated for each call.

    Attributes:
        patterns: the pattern of every layer and head.
        selection: "budget" spends at most ceil(2 s / 64) + 3 block offsets on s slashes, those of
            most mass; "lines" covers each of the s best distances, as published, whatever it costs.
        budget_length: context length that the budgets are meant for; shorter contexts, padding
            counted, get budgets in proportion. None keeps them as they are.
    """

    name: ClassVar[str] = "minference"
    # an index of fewer launches: .7 to 1.6 ms where dense attention takes 1.6
    cuda_work: ClassVar[int] = 1 << 38
    patterns: HeadPatterns
    selection: str = "budget"
    budget_length: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.selection not in SELECTIONS:
            raise unknown_name("selection", self.selection, SELECTIONS)
        if self.budget_length is not None and self.budget_length < 1:
            raise ValueError(
                f"budget_length must be None or at least 1 token, got {self.budget_length}"
            )
        for pattern in self.patterns.counts():
            if isinstance(pattern, BlockSparse) and pattern.block != BLOCK:
                raise UnsupportedError(
                    f"block-sparse heads are served by blocks of {BLOCK} keys, got {pattern}; "
                    f"use BlockSparse({pattern.topk * pattern.block // BLOCK})"
                )

    @classmethod
    def from_pretrained(cls, name_or_path: str, **options: object) -> Self:
        """The method with the patterns of a supported model id or of a pattern file."""
        return cls(patterns=HeadPatterns.from_pretrained(name_or_path), **options)  # type: ignore[arg-type]

    def keys_per_row(self, layer: int | None = None) -> float | None:
        """Most keys a row that the budgets buy, on average over the heads of a layer, or of the
        model, dense heads apart; None where nothing bounds them, and for a model whose budgets
        shrink with the context."""
        if self.selection != "budget" or (layer is None and self.budget_length is not None):
            return None
        if layer is not None:
            own = self._bought[layer]
            return None if None in own else sum(x or 0 for x in own) / len(own)
        every = [keys for own in self._bought for keys in own if keys is not None]
        return sum(every) / len(every) if every else None

    @cached_property
    def _bought(self) -> list[list[int | None]]:
        return [[_most_keys(pattern) for pattern in layer] for layer in self.patterns.patterns]

    def layer_patterns(self, context: Context) -> list[Pattern]:
        """The pattern of each of this call's heads."""
        own = [self.patterns.patterns[context.layer][head] for head in context.heads]
        if self.budget_length is None:
            return own
        return [pattern.served(context.layout.kv_len, self.budget_length) for pattern in own]

    def build_index(self, q: Tensor, k: Tensor, context: Context) -> SparseIndex | None:
        by_kind: dict[type, list[int]] = {}
        own = self.layer_patterns(context)
        for head, pattern in enumerate(own):
            by_kind.setdefault(type(pattern), []).append(head)
        if by_kind.keys() == {Dense}:
            return None
        parts = []
        for kind, heads in by_kind.items():
            chosen = [own[head] for head in heads]
            if kind is VerticalSlash:
                index = self._vertical_slash(q, k, context, heads, chosen)
            else:
                index = _index_of(kind, q, k, context, heads, chosen)
            parts.append((heads, index))
        return merge_heads(parts, q.shape[1])

    def _vertical_slash(
        self, q: Tensor, k: Tensor, context: Context, heads: list[int], chosen: list[Any]
    ) -> SparseIndex:
        layout = context.layout
        columns = tuple(pattern.vertical for pattern in chosen)
        slashes = tuple(pattern.slash for pattern in chosen)
        call = (q, k, layout.first, layout.stop)
        options = {"scale": context.scale, "softcap": context.softcap, "impl": context.impl}
        if self.selection == "budget":
            budgets = tuple(offset_budget(s) for s in slashes)
            lines = best_lines(*call, columns, budgets, heads=heads, **options)
            offsets = lines.offsets, lines.offset_bits
            return assemble(layout, len(chosen), offsets=offsets, columns=lines.columns)
        by_column, by_line = (x[:, heads] for x in last_query_lines(*call, **options))
        offsets = select_distances(by_line, slashes, LOCAL_BAND)
        return assemble(
            layout, len(chosen), offsets=offsets, columns=select_columns(by_column, columns)
        )


def _most_keys(pattern: Pattern) -> int | None:
    match pattern:
        case VerticalSlash():
            offsets = max(offset_budget(pattern.slash), local_offsets(LOCAL_BAND))
            return BLOCK * offsets + max(pattern.vertical, SINK_COLUMNS)
        case AShape():
            # whole blocks at both ends of the band and after the sinks
            return pattern.sink + pattern.local + 3 * BLOCK
        case BlockSparse():
            return BLOCK * pattern.topk
    return None


def _index_of(
    kind: type, q: Tensor, k: Tensor, context: Context, heads: list[int], chosen: list[Any]
) -> SparseIndex:
    """The index of heads of one kind, all but vertical-slash ones."""
    layout = context.layout

    def each(name: str) -> tuple[int, ...]:
        return tuple(getattr(pattern, name) for pattern in chosen)

    if kind is AShape:
        return a_shape_index(layout, each("sink"), each("local"))
    if kind is TriShape:
        return tri_shape_index(layout, each("sink"), each("local"), each("last"))
    if kind is BlockSparse:
        lists = pooled_block_lists(q, k, layout.first, layout.stop, each("topk"), heads=heads)
        return assemble(layout, len(chosen), blocks=lists, group_tiles=1)
    return dense_index(layout, len(chosen))
