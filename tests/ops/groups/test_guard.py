"""The guard measures what lists keep, fires where they keep too little, and not elsewhere."""

import pytest
import torch

from minference.index import Ragged
from minference.methods.grouped import Grouped
from minference.ops.attention.api import sparse_attention
from minference.ops.groups.api import grouped_blocks, guard_blocks
from minference.ops.groups.guard import guard_rows, kept_shares
from minference.ops.groups.plan import Plan
from minference.testing import Lines, context_for, layout_of, planted_qkv, random_qkv

PLAN = Plan(rows=16, mass=0.7, most=5, wider=16)


def _guarded(q: torch.Tensor, k: torch.Tensor, plan: Plan, target: float, **how: object):  # noqa: ANN202
    layout = layout_of(q, k)
    lists, wider = grouped_blocks(q, k, layout, plan, **how)  # type: ignore[arg-type]
    return guard_blocks(q, k, lists, wider, layout, target=target, **how)  # type: ignore[arg-type]


def test_kept_shares_are_those_of_the_rows_softmax() -> None:
    q, k, _ = random_qkv(4, 2, 700, 1100)
    layout = layout_of(q, k)
    lists, _ = grouped_blocks(q, k, layout, PLAN)
    got = kept_shares(q, k, lists, 1, layout, scale=0.2)
    rows = guard_rows(layout)[0].tolist()
    assert all(400 <= row < 1100 for row in rows)
    for slot, row in enumerate(rows):
        for head in range(2):
            scores = q[0, 2 * head : 2 * head + 2, row - 400] @ k[0, head, : row + 1].T * 0.2
            entries = lists.row(0, head, row // 128 - 400 // 128) // 4
            listed = torch.isin(torch.arange(row + 1) // 64, entries)
            dense = scores.softmax(dim=-1)
            own = (dense * listed).sum(dim=-1).mean()
            torch.testing.assert_close(got.recall[0, head, slot], own)
            rest = torch.nn.functional.pad(dense * ~listed, (0, -(row + 1) % 64))
            most = rest.unflatten(-1, (-1, 64)).sum(dim=-1).amax()
            torch.testing.assert_close(got.dropped[0, head, slot], most)


# the interpreter of Triton 3.6 turns arrays of one element into numbers
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
def test_triton_measures_what_plain_torch_does(device: torch.device, nan_poison: None) -> None:
    from minference.ops.groups.triton_levels import guard as fused

    q, k, _ = random_qkv(3, 1, 250, 900, dtype=torch.float16, device=device)
    q *= 3
    layout = layout_of(q, k, left_padding=(30,))
    plan = Plan(rows=16, mass=0.9, most=2, wider=12)
    lists, wider = grouped_blocks(q, k, layout, plan, impl="reference")
    done, got = fused(q, k, lists, wider, layout, 0.99, scale=0.2)
    for ragged, tiles, kept in ((lists, 1, got[0]), (wider, 4, got[1])):
        plain = kept_shares(q, k, ragged, tiles, layout, scale=0.2)
        assert float(plain.dropped.max()) > 0.1
        torch.testing.assert_close(plain.recall, kept.recall, atol=2e-3, rtol=0)
        torch.testing.assert_close(plain.dropped, kept.dropped, atol=2e-3, rtol=0)
    expected = guard_blocks(q, k, lists, wider, layout, target=0.99, scale=0.2, impl="torch")
    assert torch.equal(done.level, expected.level)
    for tile in range(done.lists.count.shape[2]):
        assert torch.equal(done.lists.row(0, 0, tile), expected.lists.row(0, 0, tile))


def test_uniform_attention_becomes_dense() -> None:
    q, k, v = random_qkv(2, 1, 3000, dim=64)
    q *= 0.01
    done = _guarded(q, k, PLAN, 0.9)
    assert done.level[0, 0].tolist() == [0, 2, 2, 2, 2, 2]
    layout = layout_of(q, k)
    index = Grouped(target=0.9, most=5, wider=16).build_index(q, k, context_for(layout, 2))
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    out = sparse_attention(q, k, v, index)
    torch.testing.assert_close(out[:, :, 512:], dense[:, :, 512:], atol=2e-5, rtol=1e-4)


def _lookups(places: list[int], rows: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Random q and k in which some rows look up one of the places each."""
    q, k, _ = random_qkv(2, 1, 4096, dim=64)
    for i, row in enumerate(rows):
        q[0, :, row] = k[0, :, places[i % len(places)]] * 3
    return q, k


def test_a_lookup_between_sampled_rows_makes_the_guard_fire() -> None:
    row = int(guard_rows(layout_of(*_lookups([0], range(0))))[0, 6])
    q, k = _lookups([700], range(row, row + 1))
    done = _guarded(q, k, Plan(rows=16, mass=0.97, most=1, wider=16), 0.05)
    assert done.level[0, 0].tolist() == [0, 0, 0, 0, 0, 0, 2, 0]
    tile = row // 128
    assert 4 * (700 // 64) + 3 in done.lists.row(0, 0, tile).tolist()
    assert int(done.lists.count[0, 0, tile]) == 2 * tile + 2


def test_more_lookups_than_a_list_has_room_for_take_the_wider_list() -> None:
    # every row of the last group looks up one of 24 far blocks
    q, k = _lookups([90 + 128 * i for i in range(24)], range(3584, 4096))
    done = _guarded(q, k, Plan(rows=64, mass=0.97, most=4, wider=40), 0.05)
    assert done.level[0, 0].tolist() == [0, 0, 0, 0, 0, 0, 0, 1]
    wanted = {4 * ((90 + 128 * i) // 64) + 3 for i in range(24)}
    assert wanted <= set(done.lists.row(0, 0, 30).tolist())


def test_the_guard_is_silent_on_ordinary_groups() -> None:
    fired = total = 0
    for seed in range(6):
        lines = [Lines(torch.tensor([5, 900]), torch.arange(0, 70, 8))] * 2
        q, k, _ = planted_qkv(lines, 4096, kv_heads=1, seed=seed)
        plan = Grouped().plan(layout_of(q, k), 3)
        level = _guarded(q, k, plan, Grouped.target).level
        fired, total = fired + int((level > 0).sum()), total + level.numel()
    assert fired <= 0.05 * total


def test_guarded_lists_are_well_formed_for_any_chunk() -> None:
    q, k, v = random_qkv(4, 2, 700, 1500, batch=2)
    layout = layout_of(q, k, left_padding=(0, 310), right_padding=(100, 0))
    method = Grouped(target=1.0, most=5, wider=16, early=0)
    index = method.build_index(q, k, context_for(layout, 4))
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
