"""The grouped estimate: the reference against a plain softmax, every implementation against it."""

import dataclasses

import pytest
import torch

from minference.index import BLOCK, Ragged
from minference.ops.build import Layout
from minference.ops.groups import reference
from minference.ops.groups.api import grouped_blocks
from minference.ops.groups.plan import Plan, spread_rows
from minference.testing import Lines, layout_of, planted_qkv, random_qkv

PLAN = Plan(rows=16, mass=0.97, most=6, wider=20)
SHAPES = {
    "whole": (4, 2, 1100, 1100, (), ()),
    "chunk": (4, 1, 700, 1500, (), ()),
    "padded": (4, 2, 1300, 1600, (0, 330), (200, 0)),
    "one query": (2, 2, 1, 700, (), ()),
    "row that ends before the chunk": (2, 1, 113, 257, (0, 0), (0, 214)),
}


def _lists(ragged: Ragged) -> list[set[int]]:
    batch, heads, tiles = ragged.count.shape
    return [
        set(ragged.row(b, h, t).tolist())
        for b in range(batch)
        for h in range(heads)
        for t in range(tiles)
    ]


def _inputs(name: str) -> tuple[torch.Tensor, torch.Tensor, Layout]:
    heads, kv_heads, q_len, kv_len, left, right = SHAPES[name]
    q, k, _ = random_qkv(heads, kv_heads, q_len, kv_len, batch=max(1, len(left)))
    return 2.5 * q, k, layout_of(q, k, left_padding=left, right_padding=right)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_torch_keeps_the_blocks_of_the_reference(name: str, softcap: float) -> None:
    q, k, layout = _inputs(name)
    expected, got = (
        grouped_blocks(q, k, layout, PLAN, scale=0.2, softcap=softcap, impl=impl)
        for impl in ("reference", "torch")
    )
    for plain, fast in zip(expected, got, strict=True):
        assert _lists(plain) == _lists(fast)


@pytest.mark.parametrize("left", [0, 70])
def test_torch_has_the_candidates_of_the_reference(left: int) -> None:
    q, k, _ = random_qkv(4, 2, 1200, 6000)
    q[0, 1, 100:900] = k[0, 0, 999] * 2
    layout = layout_of(q, k, left_padding=(left,))
    plan = Plan(rows=16, mass=0.99, most=20, wider=40, candidates=64)
    every = dataclasses.replace(plan, candidates=0)
    expected, got, other = (
        grouped_blocks(2.5 * q, k, layout, plan, scale=0.2, impl=impl)
        for plan, impl in ((plan, "reference"), (plan, "torch"), (every, "torch"))
    )
    for plain, fast in zip(expected, got, strict=True):
        assert _lists(plain) == _lists(fast)
    assert _lists(got[0]) != _lists(other[0])


def test_candidates_hold_the_near_blocks_and_the_best_means() -> None:
    means = torch.zeros(1, 1, 1, 2, 4 * 16)
    means[..., 0, 16] = means[..., 1, 47] = 1.0  # blocks 1 and 2, each for a row
    sums = torch.tensor([0.0, 0.5]).view(1, 1, 1, 2, 1)
    near = (torch.arange(4) == 0).view(1, 1, 1, 4)
    for count, expected in ((10, [0]), (11, [0, 1]), (12, [0, 1, 2]), (64, [0, 1, 2, 3])):
        listed = reference.candidates(means, sums, near, near | True, count)
        assert listed[0, 0, 0].nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize(
    ("heads", "left", "dtype", "edge"), [(2, 0, torch.float32, 2), (3, 40, torch.float16, 8)]
)
# the interpreter of Triton 3.6 turns arrays of one element into numbers
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
def test_triton_keeps_the_blocks_of_the_reference(
    heads: int, left: int, dtype: torch.dtype, edge: int, device: torch.device, nan_poison: None
) -> None:
    q, k, _ = random_qkv(heads, 1, 200, 1300, dtype=dtype, device=device)
    q *= 2.5
    layout = layout_of(q, k, left_padding=(left,))
    plan = Plan(rows=16, mass=0.97, most=6, wider=16)
    expected, got = (
        grouped_blocks(q, k, layout, plan, impl=impl) for impl in ("reference", "triton")
    )
    for plain, fast in zip(expected, got, strict=True):
        pairs = list(zip(_lists(plain), _lists(fast), strict=True))
        # equal but for entries at the edge, where rounding decides
        assert sum(len(a ^ b) for a, b in pairs) <= edge


@pytest.mark.parametrize("impl", ["torch", "triton"])
# the interpreter of Triton 3.6 turns arrays of one element into numbers
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
def test_last_rows_have_a_plan_of_their_own(
    impl: str, device: torch.device, nan_poison: None
) -> None:
    q, k, _ = random_qkv(2, 1, 600, 1100, device=device)
    layout = layout_of(q, k, left_padding=(20,))
    plan, closer = (Plan(rows=r, mass=0.97, most=m, wider=16) for r, m in ((16, 3), (32, 6)))
    (got, _), (far, _), (near, _) = (
        grouped_blocks(2 * q, k, layout, some, last=last, scale=0.2, impl=name)
        for some, last, name in (
            (plan, (50, closer), impl),
            (plan, None, "reference"),
            (closer, None, "reference"),
        )
    )
    # 1080 keys: the last whole group begins at 1024, the chunk at 480
    lists, others, closest = (_lists(x) for x in (got, far, near))
    assert lists[5:] == closest[5:] != others[5:]
    assert lists[:5] == others[:5] != closest[:5]


# the interpreter of Triton 3.6 turns arrays of one element into numbers
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize(("keys", "candidates"), [(1100, 0), (4500, 64)])
def test_triton_lists_are_the_same_a_group_at_a_time(
    candidates: int, keys: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minference.ops.groups import triton

    q, k, _ = random_qkv(2, 1, 600, keys, device=device)
    layout = layout_of(q, k, left_padding=(20,))
    plan = Plan(rows=16, mass=0.9, most=4, wider=16, candidates=candidates)
    cells = triton.read_keys(k, layout, plan, 0.0)
    expected = triton.grouped_blocks(2 * q, cells, layout, plan, scale=0.2)
    monkeypatch.setattr(triton, "RATED_AT_ONCE", 1)
    got = triton.grouped_blocks(2 * q, cells, layout, plan, scale=0.2)
    assert [_lists(x) for x in got] == [_lists(x) for x in expected]


def test_ratings_are_the_largest_share_of_a_key() -> None:
    q, k, _ = random_qkv(4, 2, 890)
    layout = layout_of(q, k)
    keys = reference.real_keys(k, layout)
    rows, positions = reference.sampled_rows(q, 2, layout, 1, 16)
    scores = reference.row_scores(rows, keys, positions, 1, 0.2, 0.0)
    sums = scores.logsumexp(dim=-1, keepdim=True)
    ratings = reference.rate_blocks(scores, sums).exp()
    for tile in range(3):  # of rows 512 to 889
        own = positions[0, 0, :, 4 * tile : 4 * tile + 4, 0]
        assert own[:, 0].tolist() == [512 + 128 * tile] * 2
        for kv_head in range(2):
            mine = q[0, 2 * kv_head : 2 * kv_head + 2]
            mine = torch.stack([x[at] for x, at in zip(mine, own, strict=True)])
            dense = (mine @ k[0, kv_head].T * 0.2).masked_fill(
                torch.arange(890) > own[..., None], float("-inf")
            )
            share = dense.softmax(dim=-1)[..., 192 - 8 : 256 + 8].amax()
            torch.testing.assert_close(ratings[0, kv_head, tile, 3], share)
    assert not ratings[0, :, 3].any()


def test_sums_count_far_blocks_by_their_means_and_where_they_double_by_keys() -> None:
    q, k, _ = random_qkv(2, 1, 2048)
    q[0, 1, :, :] *= 0.1
    q[0, 0] = k[0, 0, 999] * 3
    layout = layout_of(q, k)
    keys = reference.real_keys(k, layout)
    rows, positions = reference.sampled_rows(q, 1, layout, 3, 16)
    scores, means = (
        reference.row_scores(rows, reference.mean_cells(keys, n), positions, n, 0.2, 0.0)
        for n in (1, BLOCK)
    )
    near = torch.arange(32) >= 23
    near[0] = True
    sums = reference.row_sums(scores, means, near.view(1, 1, 1, -1))
    for head, looks_up in ((0, True), (1, False)):
        row, own = scores[0, 0, head, 5].double(), means[0, 0, head, 5].double()
        expected = row[:64].exp().sum() + row[23 * 64 :].exp().sum()
        more = 0.0
        for block in range(1, 23):
            expected += 64 * own[block].exp()
            begin, end = 64 * block, 64 * block + 64
            for part in (row[begin : begin + 8], row[begin + 8 : end - 8], row[end - 8 : end]):
                more += part.max().exp()
        assert bool(more > expected) == looks_up
        got = sums[0, 0, head, 5, 0].double()
        torch.testing.assert_close(got, (expected + more * looks_up).log(), atol=1e-4, rtol=0)


def test_a_peaked_row_rates_its_lesser_keys_by_their_share() -> None:
    # the first row of tile 28 has nearly all its attention in one key, alike to none of its
    # neighbours; what is left for others must not crowd out the second row's lookup
    q, k, _ = random_qkv(1, 1, 4096, dim=64)
    rows = spread_rows(layout_of(q, k), 7, 64, 1)[0, 0]
    q[0, 0, rows[0, 0]] = k[0, 0, 999] * 8
    q[0, 0, rows[0, 1]] = k[0, 0, 1500] * 1.4
    for impl in ("reference", "torch"):
        lists, _ = grouped_blocks(q, k, layout_of(q, k), Plan(64, 0.8, 2, 32), impl=impl)
        listed = set(lists.row(0, 0, 28).tolist())
        assert {4 * (999 // 64) + 3, 4 * (1500 // 64) + 3} <= listed


def test_chosen_are_the_best_rated_and_those_kept_always() -> None:
    ratings = torch.tensor([0.0, -1.0, -3.0, -1.0, 0.5, -1.0, 2.0, 9.0])
    always, seen = torch.arange(8) == 0, torch.arange(8) < 7
    for least, most, chosen in (
        (-2.0, 9, [0, 1, 3, 4, 5, 6]),
        (-2.0, 3, [0, 1, 4, 6]),
        (0.0, 9, [0, 4, 6]),
        (-9.0, 1, [0, 6]),
    ):
        kept = reference.choose(ratings, always, seen, least, most)
        assert kept.nonzero()[:, 0].tolist() == chosen


def test_one_row_of_one_head_that_looks_up_one_key_is_enough() -> None:
    q, k, _ = random_qkv(4, 1, 4096, dim=64)
    q[0, 2, 3600] = k[0, 0, 999] * 3
    rows = spread_rows(layout_of(q, k), 7, 64, 4)[0, 2]
    q[0, 2, rows[0, 3]] = k[0, 0, 1234] * 3
    for impl in ("reference", "torch"):
        lists, _ = grouped_blocks(q, k, layout_of(q, k), Plan(64, 0.5, 8, 32), impl=impl)
        tiles = [4 * (1234 // 64) + 3 in lists.row(0, 0, t).tolist() for t in range(28, 32)]
        assert tiles == [True, False, False, False]


@pytest.mark.parametrize("begin", [3577, 3579, 3581, 3583])
@pytest.mark.parametrize("key", [1271, 1275, 1279])
def test_a_run_of_lookups_across_tiles_and_blocks_is_kept_whole(begin: int, key: int) -> None:
    # rows 3577.. copy keys 1271.., as an answer does: over the edges of tile 28 and of block 20
    q, k, _ = random_qkv(4, 1, 4096, dim=64)
    run = torch.arange(9)
    q[0, :3, begin + run] = k[0, 0, key + run].expand(3, -1, -1) * 3
    lists, _ = grouped_blocks(q, k, layout_of(q, k), Plan(64, 0.5, 8, 32))
    for step in range(9):
        listed = lists.row(0, 0, (begin + step) // 128).tolist()
        assert 4 * ((key + step) // 64) + 3 in listed


def test_a_few_keys_far_away_are_found() -> None:
    lines = [Lines(torch.arange(334, 342), torch.tensor([0]))] * 2
    q, k, _ = planted_qkv(lines, 6000, kv_heads=1, strength=14)
    layout = layout_of(q, k)
    plan = Plan(rows=64, mass=0.97, most=4, wider=20)
    for impl in ("reference", "torch"):
        lists, _ = grouped_blocks(q, k, layout, plan, impl=impl)
        found = [4 * (334 // 64) + 3 in lists.row(0, 0, t).tolist() for t in range(3, 47)]
        assert all(found)


def test_rows_spread_over_what_the_chunk_has_of_each_tile() -> None:
    q, k, _ = random_qkv(4, 2, 700, 1500)
    rows = spread_rows(layout_of(q, k), 0, 16, 2)
    assert rows.tolist() == [
        [
            [[-1] * 4, [-1] * 4, [800, 823, 855, 895], [896, 927, 970, 1023]],
            [[-1] * 4, [-1] * 4, [800, 838, 871, 895], [896, 948, 991, 1023]],
        ]
    ]
