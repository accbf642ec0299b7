"""Tri-shape: A-shape, and dense rows at the end of the prompt (SCBench, arXiv 2412.10319)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from minference import patterns
from minference.index import SparseIndex
from minference.methods.base import Context, Method
from minference.ops.build import tri_shape_index


@dataclass(frozen=True, kw_only=True)
class TriShape(Method):
    """Sinks and a local window in whole blocks; tiles that hold one of the `last` rows are dense.

    In chunked prefill the last rows are those of each chunk.
    """

    name: ClassVar[str] = "tri_shape"
    sink: int = 128
    local: int = 3968
    last: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        patterns.TriShape(self.sink, self.local, self.last)

    def build_index(self, q: Tensor, k: Tensor, context: Context) -> SparseIndex:
        heads = q.shape[1]
        return tri_shape_index(
            context.layout,
            (self.sink,) * heads,
            (self.local,) * heads,
            (self.last,) * heads,
        )
