"""Which cheap rating of key blocks finds those that a sampled row looks up, on the stand-in's q, k.

python benchmarks/grouped_ratings.py --out benchmarks/results/grouped_ratings.jsonl

Of the far blocks in which some sampled row of a group's last ones has at least `share` of its
attention: how many are among the best by each rating, 12 questions over the last thousand tokens.
`products` are multiplications, as a share of those of every key by the sampled rows.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import torch
from captured import MODEL, captured
from torch import Tensor

from minference.bench.records import Recorder
from minference.index import BLOCK, TILE
from minference.lengths import length_argument
from minference.ops.groups.plan import GROUP, GROUP_TILES, row_places

HALF = 64
"""Channels of a head of 128 between the two that a rotary angle turns."""

BANDS = (
    *((fast, 1, 64) for fast in (4, 8, 16, 64)),
    *((fast, 2, 64) for fast in (8, 16, 64)),
    *((fast, 4, 64) for fast in (8, 16, 64)),
    *((8, 1, count) for count in (32, 96)),
    *((16, 4, count) for count in (32, 96)),
    (2, 8, 64),
)
"""Keys of a mean in fast channels and in slow ones, and how many channels are slow."""

NEAR = 9
"""Blocks of a group and the one before it, which are kept anyway."""


def e4m3(x: Tensor, unit: Tensor) -> Tensor:
    return (x / unit).to(torch.float8_e4m3fn).float() * unit


class Ratings:
    """Scores of a group's sampled rows [heads, share, rows, D], of all its queries
    [heads, share, GROUP, D], against its keys [heads, n, D]."""

    def __init__(self, rows: Tensor, queries: Tensor, keys: Tensor, positions: Tensor) -> None:
        self.rows, self.queries, self.keys, self.positions = rows, queries, keys, positions
        self.scale = rows.shape[-1] ** -0.5
        exact = self.masked(self.dot(rows, keys), 1)
        self.sums = exact.logsumexp(dim=-1, keepdim=True)
        self.blocks = exact.unflatten(-1, (-1, BLOCK))
        shares = (self.blocks - self.sums[..., None]).exp().sum(dim=-1)
        self.largest = shares.amax(dim=(1, 2))

    def dot(self, rows: Tensor, keys: Tensor) -> Tensor:
        return torch.einsum("hsrd,hnd->hsrn", rows, keys) * self.scale

    def masked(self, scores: Tensor, size: int) -> Tensor:
        begin = torch.arange(scores.shape[-1], device=scores.device) * size
        return scores.masked_fill(begin > self.positions[None, :, :, None], -torch.inf)

    def cells(self, size: int) -> Tensor:
        return self.keys.unflatten(1, (-1, size))

    def best(self, scores: Tensor, size: int) -> Tensor:
        """The largest share of any row that a block's best cell has."""
        own = self.masked(scores, size).unflatten(-1, (-1, BLOCK // size)).amax(dim=-1)
        return (own - self.sums).amax(dim=(1, 2))

    def key(self) -> Tensor:
        return self.best(self.dot(self.rows, self.keys), 1)

    def key_e4m3(self) -> Tensor:
        """As the kernel does it: less the mean key, one unit a head of keys and of queries."""
        shift = self.keys.mean(dim=1, keepdim=True)
        keys, rows = self.keys - shift, self.rows
        keys = e4m3(keys, keys.abs().amax(dim=(1, 2), keepdim=True) / 16)
        common = (rows * shift[:, None]).sum(dim=-1, keepdim=True) * self.scale
        rows = e4m3(rows, rows.abs().amax(dim=(1, 2, 3), keepdim=True) / 15)
        return self.best(self.dot(rows, keys) + common, 1)

    def mean(self, size: int) -> Tensor:
        return self.best(self.dot(self.rows, self.cells(size).mean(dim=2)), size)

    def spread(self, size: int) -> Tensor:
        """The mean and one standard deviation along the query."""
        cells = self.cells(size)
        wide = self.dot(self.rows.square(), cells.var(dim=2, unbiased=False)) * self.scale
        return self.best(self.dot(self.rows, cells.mean(dim=2)) + wide.sqrt(), size)

    def bound(self, size: int) -> Tensor:
        """The largest product that the smallest and largest values of each channel allow."""
        cells = self.cells(size)
        high = self.dot(self.rows.clamp(min=0), cells.amax(dim=2))
        return self.best(high + self.dot(self.rows.clamp(max=0), cells.amin(dim=2)), size)

    def principal(self, count: int) -> Tensor:
        """Exact keys along their `count` strongest directions."""
        shift = self.keys.mean(dim=1, keepdim=True)
        keys = self.keys - shift
        basis = torch.linalg.eigh(keys.transpose(1, 2) @ keys)[1][..., -count:]
        rows = torch.einsum("hsrd,hde->hsre", self.rows, basis)
        common = (self.rows * shift[:, None]).sum(dim=-1, keepdim=True) * self.scale
        return self.best(self.dot(rows, keys @ basis) + common, 1)

    def levels(self, bits: int) -> Tensor:
        """Keys less their mean, each channel rounded to so many bits; one bit is its sign."""
        shift = self.keys.mean(dim=1, keepdim=True)
        keys = self.keys - shift
        if bits == 1:
            keys = keys.sign() * keys.abs().mean(dim=1, keepdim=True)
        else:
            unit = keys.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
            keys = (keys / unit).round() * unit
        common = (self.rows * shift[:, None]).sum(dim=-1, keepdim=True) * self.scale
        return self.best(self.dot(self.rows, keys) + common, 1)

    def band(self, size: int, channels: range) -> Tensor:
        """Scores of means of so many keys, in these rotary channels alone, the slowest last."""
        own = torch.tensor([c + half for half in (0, HALF) for c in channels])
        return self.dot(self.rows[..., own], self.cells(size)[..., own].mean(dim=2))

    def slow(self, size: int, count: int) -> Tensor:
        """Means of so many keys in the `count` channels that turn most slowly."""
        return self.best(self.band(size, range(HALF - count // 2, HALF)), size)

    def bands(self, fast: int, slow: int, count: int = 64) -> Tensor:
        """Means of so many keys in the `count` channels that turn most slowly, and of so many in
        the others."""
        least, cut = min(fast, slow), HALF - count // 2
        parts = ((fast, range(cut)), (slow, range(cut, HALF)))
        scores = [self.band(size, own).repeat_interleave(size // least, -1) for size, own in parts]
        return self.best(scores[0] + scores[1], least)

    def antidiagonal(self, stride: int) -> Tensor:
        """The largest share of a run of queries in a run of keys, by the sum over the antidiagonal
        of the two (arXiv 2503.16428)."""
        rows = self.queries.unflatten(2, (-1, stride)).flip(3).flatten(3)
        scores = self.dot(rows, self.keys.unflatten(1, (-1, stride)).flatten(2)) / stride
        run = torch.arange(scores.shape[-1], device=scores.device)
        scores = scores.masked_fill(run > run[-rows.shape[2] :, None], -torch.inf)
        shares = scores.log_softmax(dim=-1).unflatten(-1, (-1, BLOCK // stride))
        return shares.amax(dim=(1, 2, 4))


def band_ratings() -> dict[str, tuple[float, Callable[[Ratings], Tensor]]]:
    """Means of fewer keys in slow channels than in fast ones, and the other way round."""
    ratings: dict[str, tuple[float, Callable[[Ratings], Tensor]]] = {}
    for fast, slow, count in BANDS:
        name = f"means of {slow} in {count} slow channels, of {fast} in the others"
        products = (count / slow + (2 * HALF - count) / fast) / (2 * HALF)
        ratings[name] = (products, partial(Ratings.bands, fast=fast, slow=slow, count=count))
    return ratings


RATINGS: dict[str, tuple[float, Callable[[Ratings], Tensor]]] = {
    "every key": (1, Ratings.key),
    "every key, e4m3": (1, Ratings.key_e4m3),
    "every key, 4 bits a channel": (1, lambda x: x.levels(4)),
    "every key, 2 bits a channel": (1, lambda x: x.levels(2)),
    "every key, signs": (1, lambda x: x.levels(1)),
    "64 principal directions": (1 / 2, lambda x: x.principal(64)),
    "32 principal directions": (1 / 4, lambda x: x.principal(32)),
    "64 slow channels": (1 / 2, lambda x: x.slow(1, 64)),
    "means of 2": (1 / 2, lambda x: x.mean(2)),
    "means of 4": (1 / 4, lambda x: x.mean(4)),
    "means of 8": (1 / 8, lambda x: x.mean(8)),
    "means of 4 and a deviation": (1 / 2, lambda x: x.spread(4)),
    **band_ratings(),
    "channel bounds of 4": (1 / 2, lambda x: x.bound(4)),
    "channel bounds of 16": (1 / 8, lambda x: x.bound(16)),
    "antidiagonal sums of 8": (1, lambda x: x.antidiagonal(8)),
    "antidiagonal sums of 16": (1 / 2, lambda x: x.antidiagonal(16)),
}


def sampled(q: Tensor, k: Tensor, groups: int) -> Iterator[Ratings]:
    """The last groups of a layer. q [H, N, D], k [Hkv, N, D]."""
    kv_heads, share = len(k), len(q) // len(k)
    places = torch.cat([row_places(16, share) + TILE * t for t in range(GROUP_TILES)], dim=1)
    heads = q.float().unflatten(0, (kv_heads, share))
    last = k.shape[1] // GROUP
    for group in range(last - groups, last):
        queries = heads[:, :, group * GROUP : (group + 1) * GROUP]
        own = places.to(q.device)[None, :, :, None].expand(kv_heads, -1, -1, q.shape[-1])
        keys = k[:, : (group + 1) * GROUP].float()
        positions = (places + group * GROUP).to(q.device)
        yield Ratings(queries.gather(2, own), queries, keys, positions)


class Tally:
    """Blocks that a row looks up, and how many of them are among the best by each rating."""

    def __init__(self, shares: Sequence[float], taken: Sequence[int]) -> None:
        self.shares, self.taken = shares, taken
        self.wanted: dict[tuple[float, int], int] = defaultdict(int)
        self.found: dict[tuple[str, float, int, int], int] = defaultdict(int)

    def add(self, sample: Ratings, layer: int) -> None:
        block = torch.arange(sample.largest.shape[1], device=sample.largest.device)
        far = (block > 0) & (block < len(block) - NEAR)
        held = {at: (sample.largest >= at) & far for at in self.shares}
        for at, blocks in held.items():
            self.wanted[at, layer] += int(blocks.sum())
        for name, (_, rate) in RATINGS.items():
            order = rate(sample).masked_fill(~far, -torch.inf).argsort(descending=True)
            for at, taken in product(self.shares, self.taken):
                best = held[at].gather(1, order[:, :taken])
                self.found[name, at, taken, layer] += int(best.sum())

    def blocks(self, at: float) -> list[int]:
        """How many blocks of each layer have so large a share."""
        return [count for (share, _), count in self.wanted.items() if share == at]

    def found_by_layer(self, name: str, at: float) -> dict[int, list[float | None]]:
        """The share of them among the best, by how many are taken; None where there are none."""
        return {
            taken: [
                round(self.found[name, at, taken, layer] / count, 3) if count else None
                for layer, count in enumerate(self.blocks(at))
            ]
            for taken in self.taken
        }


def main() -> None:
    """One record a rating and share."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--model", default=str(MODEL))
    given.add_argument("--tasks", nargs="+", default=["multivalue", "key_value"])
    given.add_argument("--length", type=length_argument, default=1 << 14)
    given.add_argument("--groups", type=int, default=2, help="last ones of the prompt")
    given.add_argument("--taken", type=int, nargs="+", default=[16, 32, 118])
    given.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.3])
    given.add_argument("--out", type=Path, default=None)
    options = given.parse_args()
    tally = Tally(options.shares, options.taken)
    for task in options.tasks:
        for layer, (q, k, _) in enumerate(captured(options.length, task=task, model=options.model)):
            for sample in sampled(q[0], k[0], options.groups):
                tally.add(sample, layer)
    recorder = Recorder(options.out)
    for name, (products, _) in RATINGS.items():
        for at in options.shares:
            base = {"op": "grouped_ratings", "rating": name, "products": products, "share": at}
            base |= {"tasks": options.tasks, "L": options.length, "groups": options.groups}
            found = tally.found_by_layer(name, at)
            recorder.write(base | {"blocks": tally.blocks(at), "found_by_layer": found})
            print(f"{name:48} share {at}: {found}", flush=True)


if __name__ == "__main__":
    main()
