"""The grouped method keeps the contract and the mass that it promises."""

import pytest
import torch

from minference.methods.grouped import Grouped
from minference.ops.groups.reference import group_masses, keep_mass, spread_rows
from minference.testing import Lines, check_method, context_for, layout_of, planted_qkv, random_qkv


def test_grouped_keeps_the_contract() -> None:
    check_method(Grouped())


def test_masses_are_those_of_the_sampled_rows_softmax() -> None:
    q, k, _ = random_qkv(4, 2, 900)
    layout = layout_of(q, k)
    scale = q.shape[3] ** -0.5
    by_offset, by_block = group_masses(q, k, layout, rows=16, scale=scale)
    scores = q @ k.repeat_interleave(2, dim=1).transpose(2, 3) * scale
    later = torch.ones(900, 900, dtype=torch.bool).triu(1)
    dense = scores.masked_fill(later, float("-inf")).softmax(dim=-1)
    dense = dense.unflatten(1, (2, 2)).mean(dim=2)
    for group in range(2):
        rows, _ = spread_rows(layout, group, 16)
        own = dense[0, :, rows[0]].mean(dim=1)
        torch.testing.assert_close(by_block[0, :, group, 3], own[:, 192:256].sum(dim=1))
    torch.testing.assert_close(by_offset.sum(dim=-1), torch.ones(1, 2, 2))


def test_keep_mass_takes_the_fewest_entries() -> None:
    masses = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.0, 0.0, 0.0, 0.0]])
    assert keep_mass(masses, 0.7).tolist() == [[False, True, False, True], [False] * 4]


def test_index_keeps_the_share_of_mass_with_fewer_tiles() -> None:
    lines = [Lines(torch.tensor([70, 700]), torch.arange(4))] * 2
    q, k, _ = planted_qkv(lines, 3000, kv_heads=1)
    layout = layout_of(q, k)
    context = context_for(layout, 2)
    index = Grouped(mass=0.8).build_index(q, k, context)
    mask = index.to_dense_mask()[0, 0]
    for group in range(6):
        rows = spread_rows(layout, group, 64)[0][0]
        scores = q[0][:, rows] @ k[0].transpose(1, 2) * context.scale
        future = torch.arange(3000) > rows[:, None]
        dense = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
        assert float((dense * mask[rows]).sum(dim=-1).mean()) >= 0.8
    assert index.density() < 0.7


def test_chunk_estimates_the_same_whole_groups_as_the_full_prompt() -> None:
    q, k, _ = random_qkv(4, 2, 2048)
    whole = group_masses(q, k, layout_of(q, k), rows=32, scale=0.2)
    chunk = q[:, :, 1024:].contiguous()
    part = group_masses(chunk, k, layout_of(chunk, k), rows=32, scale=0.2)
    for mine, full in zip(part, whole, strict=True):
        torch.testing.assert_close(mine[:, :, :2], full[:, :, 2:4])


@pytest.mark.parametrize("options", [{"mass": 0.0}, {"mass": 1.1}, {"rows": 0}])
def test_bad_options_are_named(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        Grouped(**options)  # type: ignore[arg-type]
