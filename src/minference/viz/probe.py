"""Keep one head's queries, keys and index while a method serves a model."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from minference.index import SparseIndex
from minference.methods.base import Context, Method
from minference.ops.build import dense_index


@dataclass
class Seen:
    """What one layer's head worked on in the last call.

    Attributes:
        q: its queries, [L, D].
        k: its keys, [N, D].
        index: the index of all heads of the call.
        heads: how many query heads the call had.
        scale: factor of the scores.
        softcap: as in `sparse_attention`.
    """

    q: Tensor
    k: Tensor
    index: SparseIndex
    heads: int
    scale: float
    softcap: float


@dataclass(frozen=True, kw_only=True)
class Probe(Method):
    """Another method, watched: everything is its doing, and one head of it is kept.

    Attributes:
        inner: the method that builds the indices.
        layer: number of the layer to keep.
        head: number of the query head to keep.
        seen: filled by a call of that layer; empty before.
    """

    name: ClassVar[str] = "probe"
    inner: Method
    layer: int
    head: int
    seen: list[Seen] = field(default_factory=list, repr=False, compare=False)

    def build_index(self, q: Tensor, k: Tensor, context: Context) -> SparseIndex | None:
        index = self.inner.build_index(q, k, context)
        if context.layer == self.layer and self.head in context.heads:
            own = context.heads.index(self.head)
            self.seen[:] = [
                Seen(
                    q[0, own].clone(),
                    k[0, own * k.shape[1] // q.shape[1]].clone(),
                    dense_index(context.layout, q.shape[1]) if index is None else index,
                    q.shape[1],
                    context.scale,
                    context.softcap,
                )
            ]
        return index
