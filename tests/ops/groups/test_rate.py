"""The coarse pass on the GPU against the reference, exact and in fp8."""

import pytest
import torch

from minference.ops.groups import reference
from minference.ops.groups.plan import Plan
from minference.testing import layout_of, random_qkv

LOG2_E = 1.4426950408889634


@pytest.mark.parametrize(
    ("dtype", "cell", "softcap", "worst"),
    [(torch.float32, 16, 0.0, 1e-4), (torch.float16, 8, 0.0, 0.25), (torch.float16, 16, 3.0, 0.25)],
)
# the interpreter of Triton 3.6 turns arrays of one element into numbers
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
def test_ratings_are_those_of_the_reference(
    dtype: torch.dtype,
    cell: int,
    softcap: float,
    worst: float,
    device: torch.device,
    nan_poison: None,
) -> None:
    from minference.ops.groups.triton_rate import mean_cells, rate, rated_at_once

    q, k, _ = random_qkv(3, 1, 180, 5000, dtype=dtype, device=device)
    q *= 2.5
    k[..., 0] += 4  # as keys have it that rotate slowly
    k += random_qkv(1, 1, 79, dtype=dtype, device=device)[1].repeat_interleave(64, dim=2)[
        :, :, :5000
    ]
    layout = layout_of(q, k, left_padding=(50,))
    plan = Plan(rows=16, cell=cell, sum_cell=16, floor=16, share=0.0, cap=16, mass=0.7)
    blocks = 2 * -(-5000 // 128)
    parts = -(-3 // rated_at_once(dtype, 3))
    ratings = torch.zeros(1, 1, parts, blocks, device=device)
    cells = mean_cells(k, layout, cell, 16, shifted=not softcap)
    rate(q, cells, layout, plan, ratings, 0, scale=0.1, softcap=softcap)
    keys = reference.real_keys(k, layout)
    own, positions, _ = reference.sampled_rows(q, 1, layout, 0, 16)
    fine, wide = (
        reference.row_scores(own, reference.mean_cells(keys, layout, size), 0.1, softcap)
        for size in (cell, 16)
    )
    expected = reference.rate_blocks(fine, wide, positions, plan)[0, 0] * LOG2_E
    seen = int(positions.min()) // 512 * 8 - 1
    assert seen > 64
    error = (ratings[0, 0].amax(dim=0) - expected)[:seen]
    assert float(error.square().mean().sqrt()) < worst * float(expected[:seen].std())
