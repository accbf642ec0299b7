"""The checks of a method find planted faults."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from minference.index import SparseIndex
from minference.methods import Context, Method
from minference.ops.build import a_shape_index, assemble, band_offsets
from minference.ops.estimate.api import last_query_lines
from minference.ops.select.api import select_columns
from minference.testing import check_method


@dataclass(frozen=True, kw_only=True)
class Planted(Method):
    """Whatever a test wants a method to do."""

    name: ClassVar[str] = "planted"
    build: Callable[[Tensor, Tensor, Context], SparseIndex]

    def build_index(self, q: Tensor, k: Tensor, context: Context) -> SparseIndex:
        return self.build(q, k, context)


def band(context: Context, heads: int = 4, sink: int = 1) -> SparseIndex:
    return a_shape_index(context.layout, (sink,) * heads, (64,) * heads)


def last_rows_of_the_buffer(q: Tensor, k: Tensor, context: Context) -> SparseIndex:
    layout = context.layout
    end = torch.full_like(layout.stop, layout.kv_len)
    columns = select_columns(last_query_lines(q, k, layout.first, end).columns, (40,) * 4)
    return assemble(layout, 4, offsets=band_offsets(layout, (64,) * 4), columns=columns)


def two_best_keys(q: Tensor, k: Tensor, context: Context) -> SparseIndex:
    k.norm(dim=-1).topk(2)
    return band(context)


def in_place(q: Tensor, k: Tensor, context: Context) -> SparseIndex:
    k.div_(k.norm(dim=-1, keepdim=True))
    return band(context)


@pytest.mark.parametrize("heads", [4, 2])
def test_an_index_of_query_or_kv_heads_passes(heads: int) -> None:
    check_method(Planted(build=lambda q, k, context: band(context, heads)))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda q, k, context: band(context, 3), ValueError, "or 2 KV heads, got 3"),
        (last_rows_of_the_buffer, AssertionError, "right padding changes the index at 500"),
        (two_best_keys, RuntimeError, "selected index k out of range"),
        (lambda q, k, context: band(context, sink=q.shape[2] != 65), AssertionError, "0 at 65"),
        (lambda q, k, context: band(context, sink=q.shape[2] != 300), AssertionError, "0 at 300"),
        (
            lambda q, k, context: band(context, sink=1 - context.layer),
            AssertionError,
            "does not see position 0 at 500 tokens in layer 1",
        ),
        (in_place, AssertionError, "attention is not that under the index's mask at 500"),
    ],
    ids=["heads", "right padding", "one token", "65", "300", "second layer", "attention"],
)
def test_a_planted_fault_is_found(
    build: Callable[..., SparseIndex], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check_method(Planted(build=build))
