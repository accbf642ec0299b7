"""XAttention: blocks of 128 chosen by antidiagonal sums of their scores (arXiv 2503.16428)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from minference.index import TILE, SparseIndex
from minference.methods.base import Context, Method
from minference.ops.antidiagonal.api import antidiagonal_tiles
from minference.ops.build import assemble


@dataclass(frozen=True, kw_only=True)
class XAttention(Method):
    """For every 128 queries the fewest blocks of 128 keys that cover a share of their attention,
    as sums along every stride-th antidiagonal estimate it.

    The first block and the diagonal one are always computed and count first. A chunk's estimate
    sees the chunk's rows alone.

    Attributes:
        stride: queries and keys of one antidiagonal; the estimate is 1 / stride of the dense score
            product.
        threshold: share of the estimated weights that the blocks cover.
    """

    name: ClassVar[str] = "xattention"
    stride: int = 8
    threshold: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride < 1 or TILE % self.stride:
            raise ValueError(f"stride must be a divisor of {TILE}, got {self.stride}")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be a share in (0, 1], got {self.threshold}")

    def build_index(self, q: Tensor, k: Tensor, context: Context) -> SparseIndex:
        blocks = antidiagonal_tiles(
            q,
            k,
            context.layout,
            stride=self.stride,
            threshold=self.threshold,
            scale=context.scale,
            softcap=context.softcap,
        )
        return assemble(context.layout, q.shape[1], blocks=blocks, group_tiles=1)
