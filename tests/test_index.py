"""The index against brute force: the offset rule, masks, density, merging, checks."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minference.index import BLOCK, TILE, Ragged, SparseIndex, merge_heads, pack_bits, real_bounds
from minference.ops.build import Layout, a_shape_index, assemble, dense_index, tri_shape_index
from minference.ops.select.lists import columns_from_positions, lines_to_offsets
from minference.testing import layout_of, mixed_index, random_qkv

LENGTHS = (1, 63, 64, 65, 127, 129, 300)


def whole(length: int, q_len: int | None = None, batch: int = 1) -> Layout:
    first, stop = real_bounds(batch, length, "cpu")
    return Layout(first, stop, q_len or length, length)


@pytest.mark.parametrize("length", LENGTHS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_lines_are_covered_exactly_by_touched_blocks(length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    slashes = torch.randint(0, length, (1, 1, 3), generator=generator)
    columns = torch.randint(0, length, (1, 1, 5), generator=generator)
    index = assemble(
        whole(length),
        1,
        offsets=lines_to_offsets(slashes, length),
        columns=columns_from_positions(columns, length),
    )
    mask = index.to_dense_mask()[0, 0]
    rows, keys = torch.arange(length)[:, None], torch.arange(length)
    distance = rows - keys
    nominal = torch.isin(distance, torch.cat([slashes.flatten(), torch.zeros(1, dtype=torch.long)]))
    touched = torch.zeros(-(-length // TILE), -(-length // BLOCK), dtype=torch.bool)
    for i, j in nominal.nonzero().tolist():
        touched[i // TILE, j // BLOCK] = True
    by_key = touched.repeat_interleave(TILE, 0)[:length].repeat_interleave(BLOCK, 1)[:, :length]
    by_key = by_key | torch.isin(keys, columns)
    expected = by_key & (distance >= 0)
    # an offset holds for every tile, so a tile may also get the block where no row meets the line
    assert bool((mask | ~expected).all())
    assert bool((mask & (distance < 0)).sum() == 0)
    assert bool(mask.any(dim=-1).all())
    assert bool(mask.diagonal().all())


@pytest.mark.parametrize("length", LENGTHS)
def test_a_shape_mask_is_exact(length: int) -> None:
    sinks, windows = (0, 3, 64, 70), (1, 64, 100, 5)
    mask = a_shape_index(whole(length), sinks, windows).to_dense_mask()[0]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    for h, (sink, window) in enumerate(zip(sinks, windows, strict=True)):
        expected = (distance >= 0) & ((distance < window) | (torch.arange(length) < sink))
        assert torch.equal(mask[h], expected)


def test_tri_shape_covers_its_lines_and_last_rows() -> None:
    length = 900
    mask = tri_shape_index(whole(length), (10,), (70,), (30,)).to_dense_mask()[0, 0]
    rows, keys = torch.arange(length)[:, None], torch.arange(length)
    causal = rows >= keys
    nominal = causal & ((rows - keys < 70) | (keys < 10) | (rows >= length - 30))
    assert bool((mask | ~nominal).all())
    assert not bool(mask[500, 100:256].any())


@pytest.mark.parametrize("length", LENGTHS)
def test_dense_index_is_the_causal_triangle(length: int) -> None:
    index = dense_index(whole(length), 2)
    assert torch.equal(index.to_dense_mask()[0, 1], torch.ones(length, length).tril().bool())
    assert index.density() == 1.0


@pytest.mark.parametrize("split", [1, 129, 500])
def test_chunks_see_what_the_whole_prompt_sees(split: int) -> None:
    length = 700
    slashes, columns = torch.tensor([[[0, 90, 333]]]), torch.tensor([[[5, 60, 300, 640]]])
    masks = []
    for q_len in (length, split):
        index = assemble(
            whole(length, q_len),
            1,
            offsets=lines_to_offsets(slashes, length),
            columns=columns_from_positions(columns, length),
        )
        masks.append(index.to_dense_mask())
    assert torch.equal(masks[0][:, :, -split:], masks[1])


@pytest.mark.parametrize(("q_len", "kv_len"), [(300, 300), (129, 300), (500, 700)])
def test_density_counts_the_unmasked_pairs(q_len: int, kv_len: int) -> None:
    q, k, _ = random_qkv(10, 2, q_len, kv_len, batch=2)
    index = mixed_index(layout_of(q, k, left_padding=(0, 37)), 10)
    free = SparseIndex.from_tensors(index.tensors(), q_len, kv_len)
    object.__setattr__(free, "window", torch.full_like(index.window, 1 << 30))
    mask = free.to_dense_mask()
    for b in range(2):
        area = sum(i + 1 for i in index.rows(b))
        expected = mask[b].sum(dim=(1, 2)).double() / area
        torch.testing.assert_close(index.head_density()[b], expected)


def test_merged_heads_keep_their_lists() -> None:
    layout = whole(300)
    a = a_shape_index(layout, (3, 70), (5, 100))
    d = dense_index(layout, 1)
    merged = merge_heads([([2, 0], a), ([1], d)], 3)
    mask = merged.to_dense_mask()[0]
    assert torch.equal(mask[2], a.to_dense_mask()[0, 0])
    assert torch.equal(mask[0], a.to_dense_mask()[0, 1])
    assert torch.equal(mask[1], d.to_dense_mask()[0, 0])
    swapped = merge_heads([([1, 0], a)], 2).to_dense_mask()[0]
    assert torch.equal(swapped, a.to_dense_mask()[0].flip(0))
    with pytest.raises(ValueError, match=r"heads 0\.\.3 once"):
        merge_heads([([2, 0], a), ([1], d)], 4)


def test_bitmap_words() -> None:
    flags = torch.zeros(40, dtype=torch.bool)
    flags[[0, 31, 33]] = True
    assert pack_bits(flags).tolist() == [1 - (1 << 31), 2]


def test_bounds_of_padded_rows() -> None:
    keep = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]).bool()
    first, stop = real_bounds(2, 4, "cpu", keep)
    assert first.tolist() == [2, 0]
    assert stop.tolist() == [4, 3]


def lists_of(*values: int) -> Ragged:
    rows = torch.tensor(values).view(1, 1, 1, -1)
    return Ragged.from_rows(rows, torch.tensor([[[len(values)]]]))


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"blocks": lists_of(7, 3)}, r"blocks\[0, 0, 0\] must ascend strictly from 0"),
        ({"blocks": lists_of(1, 2)}, "drop duplicates"),
        ({"blocks": lists_of(4)}, "must name a row half"),
        ({"blocks": lists_of(3), "columns": lists_of(63)}, "outside the listed blocks"),
        ({"columns": lists_of(200)}, "must be positions of 200 keys"),
        (
            {"offsets": (lists_of(-1, 2), torch.ones(1, 1, 1, 1).int()), "columns": lists_of(5)},
            "must be the bitmap",
        ),
        ({"group_tiles": 0}, "group_tiles must be at least 1"),
    ],
)
def test_bad_lists_are_named(lists: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assemble(whole(200), 1, **lists).check()


def test_bad_strides_are_named() -> None:
    index = a_shape_index(whole(200, batch=2), (3, 70), (5, 100))
    index.check()
    count = index.blocks.count[:1].expand(2, -1, -1)
    with pytest.raises(ValueError, match="must be contiguous"):
        replace(index, blocks=replace(index.blocks, count=count)).check()


def test_description_names_every_head() -> None:
    text = mixed_index(whole(300), 5).describe()
    assert text.count("head ") == 5
    assert "density" in text
    assert "groups of 128 rows" in text
