"""Candidates, their ratings and the lists from them on the GPU, against the reference."""

import pytest
import torch

from minference.ops.build import Layout
from minference.ops.groups import triton_cells
from minference.ops.groups.api import grouped_blocks
from minference.ops.groups.plan import Plan
from minference.testing import layout_of, random_qkv


@pytest.mark.parametrize(
    ("dtype", "heads", "rows", "listed", "cell", "worst"),
    [
        (torch.float32, 1, 128, 64, 4, 0),
        (torch.float32, 3, 16, 64, 1, 0),
        (torch.float16, 2, 64, 64, 4, 30),
        (torch.float32, 1, 16, 192, 4, 0),
    ],
    ids=[
        "2 tiles at once",
        "single keys, 16 tiles at once, two bundles",
        "e4m3",
        "no power of two",
    ],
)
# the interpreter of Triton 3.6 turns arrays of one element into numbers
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
def test_lists_are_those_of_the_reference(
    dtype: torch.dtype,
    heads: int,
    rows: int,
    listed: int,
    cell: int,
    worst: int,
    device: torch.device,
    nan_poison: None,
) -> None:
    q, k, _ = random_qkv(heads, 1, 300, 66 * listed + 800, dtype=dtype, device=device)
    q *= 2.5
    q[0, -1, 100:228] += k[0, 0, 999]  # looked up: the sum of such rows more than doubles
    layout = layout_of(q, k, left_padding=(50,))
    plan = Plan(rows=rows, mass=0.999, most=20, wider=40, candidates=listed, cell=cell)
    check(q, k, layout, plan, worst)


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
def test_wide_heads_on_a_gpu_without_e4m3(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_cells, "capability", lambda device: (8, 6))
    q, k, _ = random_qkv(3, 1, 300, 5000, dim=160, dtype=torch.float16, device=device)
    plan = Plan(rows=64, mass=0.999, most=20, wider=40, candidates=64)
    check(q, k, layout_of(q, k), plan, 1)


def check(q: torch.Tensor, k: torch.Tensor, layout: Layout, plan: Plan, worst: float) -> None:
    """At most so many entries in a hundred differ from the reference's."""
    expected, got = (
        grouped_blocks(q, k, layout, plan, scale=0.1, impl=impl) for impl in ("reference", "triton")
    )
    for plain, fast in zip(expected, got, strict=True):
        different = total = 0
        for at in range(plain.count.shape[2]):
            own, theirs = (set(x.row(0, 0, at).tolist()) for x in (plain, fast))
            different, total = different + len(own ^ theirs), total + len(own)
        # e4m3 chooses others among blocks that are rated alike
        assert different <= worst * total / 100
