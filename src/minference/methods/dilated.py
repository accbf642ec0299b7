"""Fixed dilated patterns, the static baselines of MInference's evaluation (arXiv 2407.02490)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from minference.index import SparseIndex
from minference.methods.base import Context, Method
from minference.ops.build import assemble
from minference.ops.select.lists import columns_from_positions, lines_to_offsets

_COLUMNS = 1024


def _lines_index(q: Tensor, context: Context, distances: Tensor) -> SparseIndex:
    layout = context.layout
    shape = (layout.batch, q.shape[1], -1)
    columns = torch.arange(_COLUMNS, device=q.device).expand(shape)
    return assemble(
        layout,
        q.shape[1],
        offsets=lines_to_offsets(distances.to(q.device).expand(shape), layout.kv_len),
        columns=columns_from_positions(columns, layout.kv_len),
    )


@dataclass(frozen=True, kw_only=True)
class Dilated1(Method):
    """The first 1024 columns and every second distance below 8192.

    Computed in whole blocks, hence a superset: the full band of 8192.
    """

    name: ClassVar[str] = "dilated1"

    def build_index(self, q: Tensor, k: Tensor, context: Context) -> SparseIndex:
        return _lines_index(q, context, torch.arange(0, 8192, 2))


@dataclass(frozen=True, kw_only=True)
class Dilated2(Method):
    """The first 1024 columns, the distances below 2048 and every second one up to 6142.

    Computed in whole blocks, hence a superset: the full band of 6143.
    """

    name: ClassVar[str] = "dilated2"

    def build_index(self, q: Tensor, k: Tensor, context: Context) -> SparseIndex:
        return _lines_index(
            q, context, torch.cat([torch.arange(2048), torch.arange(2048, 6143, 2)])
        )
