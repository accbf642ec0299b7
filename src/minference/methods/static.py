"""Static vertical-slash: lines estimated on the first prompt and kept for all later ones, the
paper's evidence that indices must be dynamic (arXiv 2407.02490)."""

from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from minference.head_patterns import HeadPatterns
from minference.index import SparseIndex
from minference.methods.base import Context, Method
from minference.ops.build import assemble
from minference.ops.estimate.api import last_query_lines
from minference.ops.select.lists import (
    columns_from_positions,
    lines_to_offsets,
    top_flags,
)
from minference.patterns import VerticalSlash

_FORCED = 30


@dataclass(frozen=True, kw_only=True)
class Static(Method):
    """The first prompt's columns and distances of each layer and head, for every prompt.

    Heads whose pattern is not vertical-slash take the default budgets.

    Attributes:
        patterns: budgets of every layer and head.
        lines: what was estimated so far, by layer and heads; filled by the first call.
    """

    name: ClassVar[str] = "static"
    patterns: HeadPatterns
    lines: dict[tuple[int, tuple[int, ...]], tuple[Tensor, Tensor]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @classmethod
    def from_pretrained(cls, name_or_path: str, **options: object) -> Self:
        """The method with the budgets of a supported model id or of a pattern file."""
        return cls(patterns=HeadPatterns.from_pretrained(name_or_path), **options)  # type: ignore[arg-type]

    def build_index(self, q: Tensor, k: Tensor, context: Context) -> SparseIndex:
        key = (context.layer, context.heads)
        if key not in self.lines:
            self.lines[key] = self._estimate(q[:1], k[:1], context)
        layout = context.layout
        columns, distances = (x.to(q.device).expand(layout.batch, -1, -1) for x in self.lines[key])
        return assemble(
            layout,
            q.shape[1],
            offsets=lines_to_offsets(distances, layout.kv_len),
            columns=columns_from_positions(columns, layout.kv_len),
        )

    def _estimate(self, q: Tensor, k: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        own = [self.patterns.patterns[context.layer][head] for head in context.heads]
        budgets = [p if isinstance(p, VerticalSlash) else VerticalSlash() for p in own]
        layout = context.layout
        scores = last_query_lines(
            q,
            k,
            layout.first[:1],
            layout.stop[:1],
            scale=context.scale,
            softcap=context.softcap,
            impl=context.impl,
        )
        place = torch.arange(layout.kv_len, device=q.device)
        columns = top_flags(scores.columns, tuple(p.vertical for p in budgets), _FORCED)
        distances = top_flags(scores.slashes, tuple(p.slash for p in budgets), _FORCED)
        return torch.where(columns, place, -1), torch.where(distances, place, -1)
