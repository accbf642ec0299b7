"""Which keys a tile samples: one of each run, of a stride that grows with the tile."""

import pytest
import torch

from minference.index import TILE
from minference.index_samples import LEAST_STRIDE, LONG, sample_keys, sample_stride


@pytest.mark.parametrize("samples", [8, 512])
@pytest.mark.parametrize("tile", [0, 1, 5, 255, 256, 511, 512, 1023])
def test_one_key_of_each_whole_run_before_the_tile(tile: int, samples: int) -> None:
    stride = sample_stride(tile, samples)
    keys = sample_keys(tile, samples)
    assert len(keys) == tile * TILE // stride
    assert torch.equal(keys // stride, torch.arange(len(keys)))
    end = (tile + 1) * TILE
    assert stride == LEAST_STRIDE or len(keys) <= samples * (1 if end <= LONG else 2)


def test_strides_at_the_lengths_that_are_documented() -> None:
    at = {length: sample_stride(length // TILE - 1, 512) for length in (8192, 32768, 65536)}
    assert at == {8192: 32, 32768: 64, 65536: 128}
    assert sample_stride(131072 // TILE - 1, 512) == 128
    assert sample_stride((1 << 20) // TILE - 1, 512) == 1024


def test_places_in_a_run_are_spread_evenly() -> None:
    keys = sample_keys(511, 512)
    places = torch.bincount(keys % 128 // 16, minlength=8)
    assert int(places.min()) >= 0.8 * len(keys) / 8
    assert int(places.max()) <= 1.2 * len(keys) / 8
