"""Every op is a torch custom op whose fake version gives what the real one does."""

import pytest
import torch

# loading them registers the ops
from minference.ops.estimate import api as estimate
from minference.ops.lines import api as lines
from minference.ops.pool import api as pool
from minference.testing import layout_of, random_qkv

OPS = torch.ops.minference
CHECKS = ("test_schema", "test_faketensor")


# the interpreter of Triton 3.6 turns arrays of one element into numbers
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize("length", [65])
def test_fake_versions_agree(length: int, device: torch.device) -> None:
    q, k, _ = random_qkv(4, 2, length, length + 100, batch=2, device=device)
    layout = layout_of(q, k)
    call = (q, k, layout.first, layout.stop)
    cases = [(OPS.last_query_lines, (*call, 0.2, 0.0, 64, name)) for name in ("reference", "torch")]
    cases.append((OPS.last_query_masses, (*call, 0.2, 0.0, 64)))
    cases.append((OPS.pooled_block_lists, (*call, [2, 3], [0, 3], True)))
    cases.append((OPS.antidiagonal_tiles, (*call, 16, 0.5, 0.2, 0.0)))
    cases.append((OPS.flex_tiles, (*call, 0.5, 0.1, 1, 0.2, 0.0)))
    cases.append((OPS.best_lines, (*call, [3, 0], [5, 40], [3, 4], 0.2, 0.0)))
    masses = estimate.last_query_masses(*call, impl="torch")
    cases.append((OPS.select_columns, (masses.columns, [5, 40, 0, 900], 30)))
    cases.append((OPS.select_offsets, (masses.offsets, [3, 4, 5, 90], 100)))
    for op, args in cases:
        torch.library.opcheck(op, args, test_utils=CHECKS)


def test_an_index_is_built_without_a_break_in_the_graph() -> None:
    q, k, _ = random_qkv(4, 2, 300)
    layout = layout_of(q, k)

    def lists(q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
        call = (q, k, layout.first, layout.stop, (40,) * 4)
        found = lines.best_lines(*call, (2,) * 4, heads=(3, 2, 1, 0), impl="torch")
        blocks = pool.pooled_block_lists(*call)
        return [found.columns.values, found.columns.count, blocks.values, blocks.count]

    compiled = torch.compile(lists, backend="eager", fullgraph=True)
    for got, expected in zip(compiled(q, k), lists(q, k), strict=True):
        assert torch.equal(got, expected)
