"""The guard measures what lists keep, fires where they keep too little, and not elsewhere."""

import pytest
import torch

from minference.index import Ragged
from minference.methods.grouped import Grouped
from minference.ops.attention.api import sparse_attention
from minference.ops.groups.api import grouped_blocks, guard_blocks
from minference.ops.groups.guard import guard_rows, kept_share
from minference.ops.groups.plan import Plan
from minference.testing import Lines, context_for, layout_of, planted_qkv, random_qkv

PLAN = Plan(rows=16, cell=4, sum_cell=16, floor=16, share=0.0, cap=16, mass=0.7)


def _guarded(q: torch.Tensor, k: torch.Tensor, plan: Plan, target: float, **how: object):  # noqa: ANN202
    layout = layout_of(q, k)
    lists, candidates = grouped_blocks(q, k, layout, plan, **how)  # type: ignore[arg-type]
    return guard_blocks(q, k, lists, candidates, layout, target=target, **how)  # type: ignore[arg-type]


def test_kept_share_is_that_of_the_rows_softmax() -> None:
    q, k, _ = random_qkv(4, 2, 700, 1100)
    layout = layout_of(q, k)
    lists, _ = grouped_blocks(q, k, layout, PLAN)
    got = kept_share(q, k, lists, 1, layout, scale=0.2)
    rows = guard_rows(layout)[0].tolist()
    assert all(400 <= row < 1100 for row in rows)
    for slot, row in enumerate(rows):
        for head in range(2):
            scores = q[0, 2 * head : 2 * head + 2, row - 400] @ k[0, head, : row + 1].T * 0.2
            entries = lists.row(0, head, row // 128 - 400 // 128) // 4
            listed = torch.isin(torch.arange(row + 1) // 64, entries)
            own = (scores.softmax(dim=-1) * listed).sum(dim=-1).mean()
            torch.testing.assert_close(got[0, head, slot], own)


# the interpreter of Triton 3.6 turns arrays of one element into numbers
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
def test_triton_measures_what_plain_torch_does(device: torch.device, nan_poison: None) -> None:
    q, k, _ = random_qkv(3, 1, 150, 900, dtype=torch.float16, device=device)
    layout = layout_of(q, k, left_padding=(30,))
    lists, candidates = grouped_blocks(q, k, layout, PLAN, impl="reference")
    plain, fused = (
        guard_blocks(q, k, lists, candidates, layout, target=0.99, impl=impl)
        for impl in ("torch", "triton")
    )
    torch.testing.assert_close(plain.recall, fused.recall, atol=2e-3, rtol=0)
    assert torch.equal(plain.level, fused.level)


def test_uniform_attention_becomes_dense() -> None:
    q, k, v = random_qkv(2, 1, 3000, dim=64)
    q *= 0.01
    done = _guarded(q, k, PLAN, 0.9)
    assert done.level[0, 0].tolist() == [0, 0, 2, 2, 2, 2]
    layout = layout_of(q, k)
    index = Grouped(target=0.9, floor=16, share=0.0, cap=16).build_index(
        q, k, context_for(layout, 2)
    )
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    out = sparse_attention(q, k, v, index)
    torch.testing.assert_close(out[:, :, 1024:], dense[:, :, 1024:], atol=2e-5, rtol=1e-4)


def test_a_key_that_the_means_hide_is_caught() -> None:
    q, k, _ = random_qkv(2, 1, 4000, dim=64)
    q[..., 0] = k[:, :, 333, 0] = 10.0
    blind = Plan(rows=16, cell=64, sum_cell=64, floor=16, share=0.0, cap=16, mass=0.7)
    layout = layout_of(q, k)
    lists, _ = grouped_blocks(q, k, layout, blind)
    missed = [4 * (333 // 64) + 3 not in lists.row(0, 0, t).tolist() for t in range(16, 31)]
    assert any(missed)
    done = _guarded(q, k, blind, 0.8)
    kept = [4 * (333 // 64) + 3 in done.lists.row(0, 0, t).tolist() for t in range(16, 31)]
    assert all(kept)


def test_candidates_come_before_every_block() -> None:
    q, k, _ = random_qkv(2, 1, 2048)
    plan = Plan(rows=16, cell=4, sum_cell=16, floor=32, share=0.0, cap=32, mass=0.2)
    done = _guarded(q, k, plan, 0.9)
    assert done.level[0, 0].tolist()[1:] == [1, 1, 1]
    assert float(done.recall[0, 0, 3]) < 0.9


def test_the_guard_is_silent_on_ordinary_groups() -> None:
    fired = total = 0
    for seed in range(6):
        lines = [Lines(torch.tensor([5, 900]), torch.arange(0, 70, 8))] * 2
        q, k, _ = planted_qkv(lines, 4096, kv_heads=1, seed=seed)
        plan = Plan(rows=64, cell=4, sum_cell=16, floor=24, share=0.0, cap=24, mass=0.9)
        level = _guarded(q, k, plan, Grouped.target).level
        fired, total = fired + int((level > 0).sum()), total + level.numel()
    assert fired <= 0.05 * total


def test_guarded_lists_are_well_formed_for_any_chunk() -> None:
    q, k, v = random_qkv(4, 2, 700, 1500, batch=2)
    layout = layout_of(q, k, left_padding=(0, 310), right_padding=(100, 0))
    index = Grouped(target=1.0, floor=16, share=0.0, cap=16).build_index(
        q, k, context_for(layout, 4)
    )
    index.check()
    rows = slice(400, 600)
    scores = q @ k.repeat_interleave(2, dim=1).transpose(2, 3) * 32**-0.5
    place = torch.arange(1500)
    seen = place <= place[800:, None]
    real = (place >= layout.first[:, None]) & (place < layout.stop[:, None])
    scores = scores.masked_fill(~(seen & real[:, None])[:, None], float("-inf"))
    dense = scores.softmax(dim=-1) @ v.repeat_interleave(2, dim=1)
    out = sparse_attention(q, k, v, index)
    torch.testing.assert_close(out[:, :, rows], dense[:, :, rows], atol=2e-5, rtol=1e-4)
    assert isinstance(index.blocks, Ragged)
