"""A-shape: attention sinks and a local window, the same for every head (arXiv 2309.17453)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from minference import patterns
from minference.index import SparseIndex
from minference.methods.base import Context, Method
from minference.ops.build import a_shape_index


@dataclass(frozen=True, kw_only=True)
class AShape(Method):
    """The first `sink` keys and the `local` most recent ones of every query."""

    name: ClassVar[str] = "a_shape"
    sink: int = 128
    local: int = 3968

    def __post_init__(self) -> None:
        super().__post_init__()
        patterns.AShape(self.sink, self.local)

    def build_index(self, q: Tensor, k: Tensor, context: Context) -> SparseIndex:
        heads = q.shape[1]
        return a_shape_index(context.layout, (self.sink,) * heads, (self.local,) * heads)
