"""FlexPrefill: each head's pattern and budget from its last queries (arXiv 2502.20766)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from minference.index import TILE, SparseIndex
from minference.methods.base import Context, Method
from minference.ops.build import assemble
from minference.ops.flex.api import flex_tiles


@dataclass(frozen=True, kw_only=True)
class FlexPrefill(Method):
    """Tiles of 128 x 128, chosen anew for each call and head.

    A head whose pooled keys foresee the attention of its last 128 queries takes the best pooled
    blocks of the whole map; every other head takes the columns and diagonals on which those
    queries look. Both take as many as hold a share of the attention. In chunked prefill the last
    queries and the map are the chunk's.

    Attributes:
        gamma: share of the estimated attention that is computed.
        tau: a head is query-aware where the square root of the Jensen-Shannon divergence is below.
        min_budget: keys of columns, and of diagonals, that every head gets at least.
    """

    name: ClassVar[str] = "flexprefill"
    gamma: float = 0.95
    tau: float = 0.1
    min_budget: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must be a share in (0, 1], got {self.gamma}")
        if self.tau < 0:
            raise ValueError(f"tau must be at least 0, got {self.tau}")
        if self.min_budget < 0:
            raise ValueError(f"min_budget must be at least 0 keys, got {self.min_budget}")

    def build_index(self, q: Tensor, k: Tensor, context: Context) -> SparseIndex:
        blocks = flex_tiles(
            q,
            k,
            context.layout,
            gamma=self.gamma,
            tau=self.tau,
            least=max(1, -(-self.min_budget // TILE)),
            scale=context.scale,
            softcap=context.softcap,
        )
        return assemble(context.layout, q.shape[1], blocks=blocks, group_tiles=1)
