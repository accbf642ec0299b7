"""The grouped estimate: the reference against a plain softmax, every implementation against it."""

import pytest
import torch

from minference.index import Ragged
from minference.ops.build import Layout
from minference.ops.groups import reference
from minference.ops.groups.api import grouped_blocks
from minference.ops.groups.plan import Plan, spread_rows
from minference.testing import Lines, layout_of, planted_qkv, random_qkv

PLAN = Plan(rows=16, cell=4, sum_cell=16, floor=16, share=0.3, cap=64, mass=0.8)
SHAPES = {
    "whole": (4, 2, 1100, 1100, (), ()),
    "chunk": (4, 1, 700, 1500, (), ()),
    "padded": (4, 2, 1300, 1600, (0, 330), (200, 0)),
    "one query": (2, 2, 1, 700, (), ()),
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
    kept = [
        _lists(grouped_blocks(q, k, layout, PLAN, scale=0.2, softcap=softcap, impl=impl)[0])
        for impl in ("reference", "torch")
    ]
    assert kept[0] == kept[1]


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
    plan = Plan(rows=16, cell=4, sum_cell=16, floor=16, share=0.0, cap=16, mass=0.7)
    expected = _lists(grouped_blocks(q, k, layout, plan, impl="reference")[0])
    got = _lists(grouped_blocks(q, k, layout, plan, impl="triton")[0])
    assert sum(map(len, expected)) < 16 * len(expected)
    # equal but for entries at the edge, where rounding decides, to e4m3 with half precision
    assert sum(len(a ^ b) for a, b in zip(expected, got, strict=True)) <= edge


def test_masses_are_those_of_a_plain_softmax() -> None:
    q, k, _ = random_qkv(4, 2, 900)
    layout = layout_of(q, k)
    keys = reference.real_keys(k, layout)
    dense = q @ k.repeat_interleave(2, dim=1).transpose(2, 3) * 0.2
    later = torch.ones(900, 900, dtype=torch.bool).triu(1)
    dense = dense.masked_fill(later, float("-inf")).softmax(dim=-1).unflatten(1, (2, 2)).sum(dim=2)
    everything = torch.ones(1, 2, keys.shape[2] // 64, dtype=torch.bool)
    for group in range(2):
        rows, positions, tiles = reference.sampled_rows(q, 2, layout, group, 16)
        scores = reference.row_scores(rows, keys, 0.2, 0.0)
        masses = reference.tile_masses(scores, positions, tiles, everything)
        own = dense[0, :, positions[0, 0, 0]]
        for tile in range(4):
            mine = own[:, tiles[0] == tile, 192:256].sum(dim=(1, 2))
            torch.testing.assert_close(masses[0, :, tile, 3], mine)


def test_fewest_entries_of_most_mass_at_their_line() -> None:
    masses = torch.zeros(1, 1, 4, 10)
    masses[0, 0, :, 4] = torch.tensor([0.3, 0.0, 0.0, 0.1])  # a column
    masses[0, 0, torch.arange(4), 2 * torch.arange(4)] = 0.1  # a diagonal
    masses[0, 0, 1, 9] = 0.2
    every = torch.ones(1, 1, 10, dtype=torch.bool)
    tiles = torch.arange(4)[None]
    few = reference.keep_blocks(masses, every, tiles, 0.45)
    assert few.nonzero()[:, 2:].tolist() == [[0, 4], [1, 4], [2, 4], [3, 4]]
    more = reference.keep_blocks(masses, every, tiles, 0.75)
    assert int((more & ~few).sum()) == 3  # the diagonal's other three
    assert bool(reference.keep_blocks(masses, every, tiles, 1.0)[0, 0, 1, 9])


def test_a_few_keys_far_away_are_found() -> None:
    lines = [Lines(torch.arange(334, 342), torch.tensor([0]))] * 2
    q, k, _ = planted_qkv(lines, 6000, kv_heads=1, strength=14)
    layout = layout_of(q, k)
    plan = Plan(rows=64, cell=4, sum_cell=16, floor=20, share=0.0, cap=20, mass=0.8)
    for impl in ("reference", "torch"):
        lists, _ = grouped_blocks(q, k, layout, plan, impl=impl)
        found = [4 * (334 // 64) + 3 in lists.row(0, 0, t).tolist() for t in range(3, 47)]
        assert all(found)


def test_rows_spread_over_what_the_chunk_has_of_a_group() -> None:
    q, k, _ = random_qkv(2, 2, 700, 1500)
    rows, real = spread_rows(layout_of(q, k), 0, 4)
    assert rows.tolist() == [[828, 884, 940, 996]]  # of 800..1023
    assert real.tolist() == [True]
