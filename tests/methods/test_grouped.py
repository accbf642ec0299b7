"""The grouped method keeps the contract and the mass that it promises."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from minference.methods import grouped
from minference.methods.grouped import Grouped
from minference.ops.build import Layout
from minference.ops.groups.plan import spread_rows
from minference.testing import Lines, check_method, context_for, layout_of, planted_qkv, random_qkv


def test_grouped_keeps_the_contract() -> None:
    check_method(Grouped())


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (100, 100), (128, 128), (100, 900)])
# the interpreter of Triton 3.6 turns arrays of one element into numbers
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
def test_short_calls_are_served_by_triton(q_len: int, kv_len: int, device: torch.device) -> None:
    q, k, _ = random_qkv(4, 2, q_len, kv_len, dim=64, device=device)
    context = context_for(layout_of(q, k), 4, dim=64)
    expected, got = (
        Grouped().build_index(q, k, replace(context, impl=impl)) for impl in ("torch", "triton")
    )
    assert torch.equal(got.to_dense_mask(), expected.to_dense_mask())


def test_every_block_with_more_than_the_rest_of_a_sampled_row_is_kept() -> None:
    lines = [Lines(torch.tensor([70, 700]), torch.arange(4))] * 2
    q, k, _ = planted_qkv(lines, 3000, kv_heads=1)
    layout = layout_of(q, k)
    context = context_for(layout, 2)
    index = Grouped(mass=0.8, early=0).build_index(q, k, context)
    mask = index.to_dense_mask()[0, 0]
    dropped = total = 0
    for group in range(6):
        for head, places in enumerate(spread_rows(layout, group, 256, 2)[0].flatten(1)):
            rows = places[places >= 0]
            scores = q[0, head, rows] @ k[0, 0].T * context.scale
            future = torch.arange(3000) > rows[:, None]
            dense = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
            dropped += int((dense * ~mask[rows] > 0.2).sum())
            total += int((dense > 0.2).sum())
    assert total > 100
    assert dropped == 0
    assert index.density() < 0.5


def test_chunk_keeps_the_same_blocks_in_whole_groups_as_the_full_prompt() -> None:
    q, k, _ = random_qkv(4, 2, 2048)
    whole = Grouped().build_index(q, k, context_for(layout_of(q, k), 4))
    chunk = q[:, :, 1024:].contiguous()
    part = Grouped().build_index(chunk, k, context_for(layout_of(chunk, k), 4))
    for tile in range(8):
        for head in range(2):
            assert torch.equal(part.blocks.row(0, head, tile), whole.blocks.row(0, head, 8 + tile))


def test_early_layers_are_dense_where_that_is_asked_for() -> None:
    method = Grouped(early=2, early_dense=True)
    check_method(method, layers=3)
    q, k, _ = random_qkv(4, 2, 300)
    first, second, third = (
        method.build_index(q, k, context_for(layout_of(q, k), 4, layer=layer)) for layer in range(3)
    )
    assert first is second is None
    assert third is not None


def test_early_layers_choose_by_single_keys_for_longer_lists() -> None:
    first, stop = torch.zeros(1), torch.ones(1)
    layout = Layout(first, stop, 1 << 17, 1 << 17)
    zero, early, late = (Grouped().plan(layout, layer) for layer in (0, 2, 3))
    assert early == replace(late, rows=256, cell=1, most=24, mass=0.99)
    assert zero == early
    assert Grouped(early=0).plan(layout, 0) == late
    q, k, _ = random_qkv(4, 2, 2048)
    method = Grouped(rows=32, most=2)
    early_index, late_index = (
        method.build_index(q, k, context_for(layout_of(q, k), 4, layer=layer)) for layer in (2, 3)
    )
    assert early_index.blocks.count.sum() > late_index.blocks.count.sum()
    assert early_index.samples == 2 * late_index.samples


def test_the_first_layer_has_more_samples() -> None:
    q, k, _ = random_qkv(4, 2, 700)
    layout = layout_of(q, k)
    for first_layer in (1, 4):
        method = Grouped(samples=8, first_layer=first_layer)
        found = [
            method.build_index(q, k, context_for(layout, 4, layer=layer)) for layer in (0, 1, 3)
        ]
        assert [index.samples for index in found] == [8 * first_layer, 16, 8]
        assert [index.sample_share for index in found] == [0.1, 0.02, 0.02]
        assert torch.equal(found[0].blocks.values, found[1].blocks.values)
    off = Grouped(samples=0).build_index(q, k, context_for(layout, 4))
    assert off.samples == 0


def test_a_long_call_looks_closer_at_its_last_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = random_qkv(4, 2, 2300, batch=2)
    context = context_for(layout_of(q, k, left_padding=(0, 300)), 4)
    close = Grouped(rows=32, most=4, mass=0.99, early=0, last=0).build_index(q, k, context).blocks
    monkeypatch.setattr(grouped, "SHORT", 2200)
    far, both = (
        Grouped(rows=32, later_most=2, most=2, early=0, last=last).build_index(q, k, context).blocks
        for last in (0, 64)
    )
    assert close.count.sum() > far.count.sum()
    for b, tiles, last in ((0, 18, 16), (1, 16, 12)):
        for head, tile in itertools.product(range(2), range(tiles)):
            wanted = close if tile >= last else far
            assert torch.equal(both.row(b, head, tile), wanted.row(b, head, tile))


def test_at_most_an_eighth_of_a_call_is_looked_at_closer(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = random_qkv(2, 1, 4608)
    context = context_for(layout_of(q, k), 2)
    monkeypatch.setattr(grouped, "SHORT", 4096)
    method = Grouped(rows=32, most=2, later_most=2, early=0)
    far, own, more = (
        replace(method, last=last).build_index(q, k, context).blocks for last in (0, 576, 2048)
    )
    assert torch.equal(more.count, own.count)
    assert own.count.sum() > far.count.sum()


def test_a_layer_that_is_looked_at_as_closely_anyway_is_estimated_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    estimate = grouped.grouped_blocks

    def watched(*inputs: Any, last: Any, **how: Any) -> Any:
        asked.append(last)
        return estimate(*inputs, last=last, **how)

    monkeypatch.setattr(grouped, "grouped_blocks", watched)
    monkeypatch.setattr(grouped, "SHORT", 600)
    monkeypatch.setattr(grouped, "FULL_ROWS", 600)
    q, k, _ = random_qkv(2, 1, 700)
    for layer in (0, 1, 3):
        context = context_for(layout_of(q, k), 2, layer=layer)
        Grouped(rows=32, last=64).build_index(q, k, context)
    assert asked[:2] == [None, None]
    assert asked[2][0] == 64


def test_a_short_call_after_a_long_context_is_looked_at_closer_as_a_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k, _ = random_qkv(4, 2, 100, 3300)
    context = context_for(layout_of(q, k), 4)
    close = Grouped(rows=32, most=4, mass=0.99, early=0, last=0).build_index(q, k, context).blocks
    monkeypatch.setattr(grouped, "SHORT", 3200)
    far, shorter, both = (
        Grouped(rows=32, later_most=2, most=2, early=0, last=last).build_index(q, k, context).blocks
        for last in (0, 99, 100)
    )
    assert torch.equal(both.count, close.count)
    assert torch.equal(both.values, close.values)
    assert torch.equal(shorter.count, far.count)
    assert close.count.sum() > far.count.sum()


def test_fewer_rows_are_scored_of_longer_contexts_and_in_later_layers() -> None:
    first, stop = torch.zeros(1), torch.ones(1)
    lengths = (1 << 10, 1 << 15, 3 << 15, 3 << 16, 1 << 18, 1 << 20, 1 << 23)
    layouts = [Layout(first, stop, n, n) for n in lengths]
    early, late = ([Grouped().plan(x, layer).rows for x in layouts] for layer in (2, 3))
    assert early == [256, 256, 256, 256, 128, 32, 32]
    assert late == [256, 256, 64, 64, 64, 16, 16]


def test_later_layers_keep_more_blocks_where_they_score_fewer_rows() -> None:
    first, stop = torch.zeros(1), torch.ones(1)
    short, long = (Grouped().plan(Layout(first, stop, n, n), 3) for n in (1 << 15, (1 << 15) + 1))
    assert (short.rows, short.most) == (256, 12)
    assert (long.rows, long.most) == (64, 14)


def test_last_rows_have_twice_the_candidates_by_means_behind_early_layers() -> None:
    layout = Layout(torch.zeros(1), torch.ones(1), 1 << 17, 1 << 17)
    early, late = (Grouped().last_plan(layout, layer) for layer in (2, 3))
    assert early == Grouped().plan(layout, 2)
    assert late == replace(early, cell=4, candidates=256)
    short = replace(layout, q_len=2048)
    assert Grouped().plan(short, 3) == late


def test_candidates_are_chosen_in_contexts_of_more_than_twice_as_many_blocks() -> None:
    first, stop = torch.zeros(1), torch.ones(1)
    plans = [Grouped().plan(Layout(first, stop, n, n), 3) for n in (1 << 14, (1 << 14) + 1)]
    assert [plan.candidates for plan in plans] == [0, 128]


@pytest.mark.parametrize(
    "options",
    [
        {"mass": 0.0},
        {"mass": 1.1},
        {"rows": 0},
        {"rows": 12},
        {"later_rows": 24},
        {"most": 0},
        {"later_most": 0},
        {"wider": 9},
        {"candidates": 96},
        {"candidates": -64},
        {"samples": -1},
        {"rows": 1024},
        {"most": 1 << 31},
        {"early": -1},
        {"first_layer": 0},
        {"sample_share": 0.0},
        {"first_share": 1.5},
        {"last": -1},
    ],
)
def test_bad_options_are_named(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        Grouped(**options)  # type: ignore[arg-type]
