"""Block lists against the readable selection, one head at a time."""

import pytest
import torch

from minference.index import TILE
from minference.ops.build import assemble
from minference.ops.pool import api
from minference.ops.pool.reference import best_blocks
from minference.testing import layout_of, random_qkv


@pytest.mark.parametrize("pooled", [1, 3 * 400 * 64, 1 << 26])
@pytest.mark.parametrize("keep_ends", [False, True])
@pytest.mark.parametrize(("length", "pad"), [(1, 0), (64, 0), (65, 37), (300, 0), (700, 37)])
def test_block_lists_match_reference(
    length: int, pad: int, keep_ends: bool, pooled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "SCORES", 40)
    monkeypatch.setattr(api, "POOLED", pooled)
    q, k, _ = random_qkv(4, 2, length + pad)
    layout = layout_of(q, k, left_padding=(pad,))
    budgets = (1, 2, 3, 50)
    lists = api.pooled_block_lists(q, k, layout.first, layout.stop, budgets, keep_ends=keep_ends)
    index = assemble(layout, 4, blocks=lists, group_tiles=1)
    index.check()
    for h, topk in enumerate(budgets):
        rows = best_blocks(q[0, h, pad:], k[0, h // 2, pad:], topk, keep_ends=keep_ends)
        for tile in range(-(-length // TILE)):
            halves = index.tile_blocks(0, h, tile)
            for half in (0, 1):
                if 2 * tile + half < len(rows):
                    got = (halves & (1 + half)).nonzero()[:, 0]
                    assert torch.equal(got, rows[2 * tile + half])


def test_ties_go_to_the_smaller_block() -> None:
    q, k = torch.ones(1, 1, 640, 16), torch.ones(1, 1, 640, 16)
    layout = layout_of(q, k)
    lists = api.pooled_block_lists(q, k, layout.first, layout.stop, (3,), keep_ends=False)
    assert (lists.row(0, 0, 4) // 4).tolist() == [0, 1, 2]


def test_some_heads_only() -> None:
    q, k, _ = random_qkv(4, 2, 700)
    layout = layout_of(q, k)
    every = api.pooled_block_lists(q, k, layout.first, layout.stop, (2, 3, 4, 5))
    some = api.pooled_block_lists(q, k, layout.first, layout.stop, (3, 5), heads=[1, 3])
    for tile in range(6):
        assert torch.equal(some.row(0, 0, tile), every.row(0, 1, tile))
        assert torch.equal(some.row(0, 1, tile), every.row(0, 3, tile))


@pytest.mark.parametrize("pad", [0, 37])
def test_a_chunk_finds_what_the_whole_prompt_finds(
    pad: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "SCORES", 40)
    q, k, _ = random_qkv(4, 2, 900 + pad)
    layout = layout_of(q, k, left_padding=(pad,))
    budgets = (1, 3, 2, 50)
    whole = api.pooled_block_lists(q, k, layout.first, layout.stop, budgets)
    chunk = api.pooled_block_lists(q[:, :, pad + 3 * TILE :], k, layout.first, layout.stop, budgets)
    for h in range(4):
        for tile in range(3, 8):
            assert torch.equal(chunk.row(0, h, tile - 3), whole.row(0, h, tile))


def test_padding_that_is_no_number_changes_nothing() -> None:
    q, k, _ = random_qkv(2, 1, 600)
    layout = layout_of(q, k, left_padding=(70,), right_padding=(30,))
    expected = api.pooled_block_lists(q, k, layout.first, layout.stop, (3, 2))
    for x in (q, k):
        x[:, :, :70] = x[:, :, -30:] = torch.nan
    got = api.pooled_block_lists(q, k, layout.first, layout.stop, (3, 2))
    assert torch.equal(got.count, expected.count)
    assert torch.equal(got.values, expected.values)


def test_a_query_that_is_no_number_leaves_its_block_some_keys() -> None:
    q, k, _ = random_qkv(1, 1, 300)
    q[0, 0, 299] = torch.nan
    layout = layout_of(q, k)
    lists = api.pooled_block_lists(q, k, layout.first, layout.stop, (3,), keep_ends=False)
    assert int(lists.count.min()) >= 1
