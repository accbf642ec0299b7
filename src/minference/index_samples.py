"""Which keys stand for those that an index leaves out, and how much they count.

Every tile of queries reads one key of each run of neighbouring keys before it, at a place in the
run that looks random and is always the same. A sampled key that the index leaves out counts as
often as its run has keys, so that sums over the keys left out keep their expected size; the run's
stride grows with the context, so that a row reads about as many at any length. It counts at most
as the index's `sample_share` of what its row has in the index's own keys, or once: a key that
matters by itself, and is sampled by chance, must not count for a whole run.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from minference.index import TILE

LEAST_STRIDE = 32
"""Shortest run."""

LONGEST_STRIDE = 1 << 15
"""Longest run: kernels reckon places in it in 32 bits."""

MOST_SAMPLES = 1 << 20

LONG = 1 << 16
"""Keys beyond which a tile reads up to twice as many samples: its other keys thin out."""

HASH = 40503
"""2^16 / golden ratio: multiples of it, modulo 2^16, spread evenly."""


def sample_stride(tile: int, samples: int) -> int:
    """Keys of a run that tile `tile` samples from: a power of two, the same for whole octaves of
    tiles."""
    end = (tile + 1) * TILE
    return max(LEAST_STRIDE, 1 << (-(-end // _most(end, samples)) - 1).bit_length())


def sample_keys(tile: int, samples: int, device: torch.device | str = "cpu") -> Int[Tensor, " n"]:
    """Positions of the keys that a tile samples, ascending: one of each whole run before it."""
    stride = sample_stride(tile, samples)
    run = torch.arange(tile * TILE // stride, device=device)
    return run * stride + (run * HASH % (1 << 16) * stride >> 16)


def check_samples(kv_len: int, samples: int) -> None:
    """Raise ValueError for more samples than any tile has, or so few that a run is longer than
    `LONGEST_STRIDE`."""
    least = -(-kv_len // (LONGEST_STRIDE * _most(kv_len, 1)))
    if samples and not least <= samples <= MOST_SAMPLES:
        raise ValueError(
            f"samples must be 0 or {least} to {MOST_SAMPLES} in a context of {kv_len} keys, got "
            f"{samples}"
        )


def sample_room(kv_len: int, samples: int) -> int:
    """Most samples that a tile of a context reads."""
    return min(_most(kv_len, samples), kv_len // LEAST_STRIDE)


def _most(end: int, samples: int) -> int:
    return samples if end <= LONG else 2 * samples
