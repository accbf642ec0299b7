"""What many tiles read at once, against the index's own word for one tile and the dense mask."""

import pytest
import torch

from minference import index_tiles
from minference.head_patterns import default_patterns
from minference.index import SparseIndex
from minference.index_tiles import tile_halves
from minference.methods import AShape, Dilated1, MInference, TriShape
from minference.methods.base import Method
from minference.patterns import BlockSparse, VerticalSlash
from minference.testing import context_for, layout_of, mixed_index, random_qkv

METHODS = [
    AShape(sink=70, local=100),
    TriShape(sink=70, local=100, last=30),
    Dilated1(),
    MInference(patterns=default_patterns(1, 4, VerticalSlash(40, 60))),
    MInference(patterns=default_patterns(1, 4, BlockSparse(3))),
]


def unmasked(index: SparseIndex) -> SparseIndex:
    """The same lists without a window, which hides keys of computed blocks."""
    free = SparseIndex.from_tensors(index.tensors(), index.q_len, index.kv_len)
    object.__setattr__(free, "window", torch.full_like(index.window, 1 << 30))
    return free


@pytest.mark.parametrize(("rows", "length"), [(700, 700), (129, 700), (1, 65)])
def test_tile_halves_say_what_tile_blocks_say(rows: int, length: int) -> None:
    q, k, _ = random_qkv(10, 2, rows, length)
    index = mixed_index(layout_of(q, k, left_padding=(3,)), 10)
    tiles = index.tiles(0)
    for h, together in enumerate(tile_halves(index, 0, range(10), tiles)):
        assert torch.equal(together, tile_halves(index, 0, range(h, h + 1), tiles)[0])
        for tile in tiles:
            own = index.tile_blocks(0, h, tile)
            found = together[tile - tiles.start]
            assert torch.equal(found[: len(own)], own.to(torch.int8))
            assert not found[len(own) :].any()


@pytest.mark.parametrize("run", [1, 3, 512])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: repr(method)[:20])
@pytest.mark.parametrize(("rows", "length"), [(700, 700), (129, 700), (1, 65)])
def test_density_counts_the_pairs_of_the_mask(
    method: Method, rows: int, length: int, run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_tiles, "RUN", run)
    q, k, _ = random_qkv(4, 2, length)
    q = q[:, :, -rows:]
    index = method.build_index(q, k, context_for(layout_of(q, k, left_padding=(3,)), 4))
    assert index is not None
    area = sum(place + 1 for place in index.rows(0))
    expected = unmasked(index).to_dense_mask().sum(dim=(2, 3)).double() / area
    torch.testing.assert_close(index.head_density(), expected)
