"""The grouped operators' fake versions give what the real ones do."""

import pytest
import torch

from minference.ops.groups.api import grouped_blocks, guard_blocks
from minference.ops.groups.plan import Plan
from minference.testing import layout_of, random_qkv

OPS = torch.ops.minference
CHECKS = ("test_schema", "test_faketensor")


@pytest.mark.parametrize("last", [0, 20])
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_fake_versions_agree(impl: str, last: int) -> None:
    q, k, _ = random_qkv(4, 2, 65, 700, batch=2)
    layout = layout_of(q, k)
    bounds = (layout.first, layout.stop)
    sizes = [65, 700, last, *(16, 5, 16, 0, 4), *(32, 10, 16, 0, 1)]
    torch.library.opcheck(
        OPS.grouped_blocks, (q, k, *bounds, sizes, [0.9, 0.9], 0.2, 0.0, impl), test_utils=CHECKS
    )
    plan = Plan(rows=16, mass=0.9, most=5, wider=16)
    lists, wider = grouped_blocks(q, k, layout, plan)
    parts = [lists.values, lists.start, lists.count, wider.values, wider.start, wider.count]
    args = (q, k, parts, *bounds, [65, 700], 0.9, 0.2, 0.0, impl)
    torch.library.opcheck(OPS.guard_blocks, args, test_utils=CHECKS)


def test_index_is_built_without_a_break_in_the_graph() -> None:
    q, k, _ = random_qkv(4, 2, 300)
    layout = layout_of(q, k)
    plan = Plan(rows=16, mass=0.9, most=5, wider=16)

    def count(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        lists, wider = grouped_blocks(q, k, layout, plan)
        return guard_blocks(q, k, lists, wider, layout, target=0.5).lists.count

    compiled = torch.compile(count, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k), count(q, k))
