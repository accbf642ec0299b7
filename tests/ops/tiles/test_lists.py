"""Rows of tiles by position, the fewest entries of a share, and lists of key tiles."""

import itertools

import torch

from minference.ops.tiles.lists import fewest, keys_by_position, queries_of_tiles, tile_lists
from minference.testing import layout_of


def test_fewest_needs_no_fewer_entries() -> None:
    masses = torch.rand(20, 6)
    need = 0.7 * masses.sum(dim=1, keepdim=True)
    kept = fewest(masses, need)
    for row, own, least in zip(masses, kept, need, strict=True):
        assert row[own].sum() >= least - 1e-6
        fewer = itertools.combinations(row.tolist(), int(own.sum()) - 1)
        assert all(sum(entries) < float(least) for entries in fewer)


def test_fewest_takes_nothing_without_mass() -> None:
    assert not bool(fewest(torch.zeros(2, 5), torch.tensor([[0.0], [1.0]])).any())


def test_ties_go_to_the_first() -> None:
    kept = fewest(torch.tensor([[1.0, 2.0, 1.0, 1.0]]), torch.tensor([[3.5]]))
    assert kept.tolist() == [[True, True, True, False]]


def test_rows_lie_at_their_positions() -> None:
    places = torch.arange(300.0).view(1, 1, 300, 1).expand(2, 2, -1, 4)
    q = places[:, :, 200:]
    layout = layout_of(q, places, left_padding=(0, 37), right_padding=(0, 3))
    keys, real = keys_by_position(places, layout)
    assert keys[0, 0, :300, 0].tolist() == list(range(300))
    assert keys[1, 1, :260, 0].tolist() == list(range(37, 297))
    assert real.sum(dim=1).tolist() == [300, 260]
    assert not bool(keys[1, :, 260:].any())
    # tile 1 holds positions 128..255: the chunk's first rows are 72 and 35 places into it
    rows, real = queries_of_tiles(q, layout, range(2))
    assert rows[0, 0, 72:172, 0].tolist() == list(range(200, 300))
    assert rows[1, 0, 35:132, 0].tolist() == list(range(200, 297))
    assert real.sum(dim=1).tolist() == [100, 97]


def test_lists_hold_both_blocks_of_every_flagged_tile() -> None:
    parts = [torch.rand(2, 3, 2, 5) < 0.4, torch.rand(2, 3, 1, 7) < 0.4]
    lists = tile_lists(parts)
    assert len(lists.values) == int(lists.count.sum())
    for b, h, tile in itertools.product(range(2), range(3), range(3)):
        flags = parts[tile // 2][b, h, tile % 2]
        expected = [8 * key + entry for key in flags.nonzero()[:, 0].tolist() for entry in (3, 7)]
        assert lists.row(b, h, tile).tolist() == expected
