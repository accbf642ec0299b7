"""The sampled rows' ratings of blocks on the GPU against the reference, exact and in e4m3."""

import math

import pytest
import torch

from minference.index import BLOCK
from minference.ops.groups import reference
from minference.ops.groups.plan import GROUP_TILES, Plan, near_blocks
from minference.testing import layout_of, random_qkv


@pytest.mark.parametrize(
    ("dtype", "rows", "softcap", "worst"),
    [(torch.float32, 128, 0.0, 1e-4), (torch.float16, 16, 3.0, 0.4)],
    ids=["exact, 2 tiles at once", "e4m3, 16 tiles at once, soft cap"],
)
# the interpreter of Triton 3.6 turns arrays of one element into numbers
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
def test_ratings_are_those_of_the_reference(
    dtype: torch.dtype,
    rows: int,
    softcap: float,
    worst: float,
    device: torch.device,
    nan_poison: None,
) -> None:
    from minference.ops.groups.triton_cells import copy_keys
    from minference.ops.groups.triton_spot import sample_rows, score_keys

    q, k, _ = random_qkv(2, 1, 400, 4500, dtype=dtype, device=device)
    q *= 2.5
    k[..., 0] += 4  # as keys have it that rotate slowly
    q[0, 1, 100:228] += k[0, 0, 999]  # looked up: the sum of such rows more than doubles
    layout = layout_of(q, k, left_padding=(50,))
    plan = Plan(rows=rows, mass=0.9, most=20, wider=16)
    cells = copy_keys(k, layout, shifted=not softcap)
    rows_ = sample_rows(q, cells, layout, plan, 0, 2, scale=0.1, softcap=softcap)
    planes = score_keys(rows_, cells, layout, 0).float()
    before, behind = (torch.full_like(planes[..., 0, :], -torch.inf) for _ in range(2))
    before[..., 1:], behind[..., :-1] = planes[..., 2, :-1], planes[..., 1, 1:]
    ratings = torch.maximum(planes.amax(dim=-2), torch.maximum(before, behind)) * math.log(2)
    keys = reference.real_keys(k, layout)
    block = torch.arange(keys.shape[2] // 64, device=device)
    for group in range(2):
        own, positions = reference.sampled_rows(q, 1, layout, group, rows)
        scores, means = (
            reference.row_scores(own, reference.mean_cells(keys, n), positions, n, 0.1, softcap)
            for n in (1, BLOCK)
        )
        near = (block == 0) | (block >= int(near_blocks(layout, group)[0]))
        sums = reference.row_sums(scores, means, near.view(1, 1, 1, -1))
        expected = reference.rate_blocks(scores, sums)[0, 0]
        for tile in range(GROUP_TILES):
            first = 8 * (int(positions.max()) // 512) + 2 * tile - 1
            own, theirs = ratings[0, group, tile, 1:first], expected[tile, 1:first]
            if theirs.isinf().all():
                assert bool((own < -1e4).all())
                continue
            assert float((own - theirs).abs().mean()) < worst * float(theirs.std())
