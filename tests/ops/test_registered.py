"""Every op is a torch custom op whose fake version gives what the real one does."""

import pytest
import torch

# loading them registers the ops
from minference.ops.antidiagonal import api as antidiagonal
from minference.ops.estimate import api as estimate
from minference.ops.flex import api as flex
from minference.ops.pool import api as pool
from minference.ops.select import api as select
from minference.testing import layout_of, random_qkv

OPS = torch.ops.minference
CHECKS = ("test_schema", "test_faketensor")


# the interpreter of Triton 3.6 turns arrays of one element into numbers
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize("length", [65])
def test_fake_versions_agree(length: int) -> None:
    q, k, _ = random_qkv(4, 2, length, length + 100, batch=2)
    layout = layout_of(q, k)
    call = (q, k, layout.first, layout.stop)
    cases = [(OPS.last_query_lines, (*call, 0.2, 0.0, 64, name)) for name in ("reference", "torch")]
    cases.append((OPS.last_query_masses, (*call, 0.2, 0.0, 64)))
    cases.append((OPS.pooled_block_lists, (*call, [2, 3], [0, 3], True)))
    cases.append((OPS.antidiagonal_tiles, (*call, 16, 0.5, 0.2, 0.0)))
    cases.append((OPS.flex_tiles, (*call, 0.5, 0.1, 1, 0.2, 0.0)))
    masses = estimate.last_query_masses(*call, impl="torch")
    for name in ("reference", "triton"):
        cases.append((OPS.select_columns, (masses.columns, [5, 40, 0, 900], 30, name)))
        cases.append((OPS.select_offsets, (masses.offsets, [3, 4, 5, 90], 100, name)))
    for op, args in cases:
        torch.library.opcheck(op, args, test_utils=CHECKS)


def test_an_index_is_built_without_a_break_in_the_graph() -> None:
    q, k, _ = random_qkv(4, 2, 300)
    layout = layout_of(q, k)

    def lists(q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
        masses = estimate.last_query_masses(q, k, layout.first, layout.stop, impl="torch")
        columns = select.select_columns(masses.columns, (40,) * 4, impl="torch")
        blocks = pool.pooled_block_lists(q, k, layout.first, layout.stop, (2,) * 4)
        strided = antidiagonal.antidiagonal_tiles(q, k, layout, stride=16, threshold=0.5, scale=0.2)
        tiles = flex.flex_tiles(q, k, layout, gamma=0.5, tau=0.1, least=1, scale=0.2)
        every = (columns, blocks, strided, tiles)
        return [tensor for lists in every for tensor in (lists.values, lists.count)]

    compiled = torch.compile(lists, backend="eager", fullgraph=True)
    for got, expected in zip(compiled(q, k), lists(q, k), strict=True):
        assert torch.equal(got, expected)
