"""Which cheap rating of key blocks finds those that a sampled row looks up, on the stand-in's q, k.

python benchmarks/grouped_ratings.py --out benchmarks/results/grouped_ratings.jsonl

Of the far blocks in which some sampled row of a group's last ones has at least `share` of its
attention: how many are among the best by each rating, 12 questions over the last thousand tokens.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from captured import captured
from torch import Tensor

from minference.bench.records import Recorder
from minference.index import BLOCK
from minference.lengths import parse_length
from minference.ops.groups.plan import GROUP, row_places
from minference.testing import default_device

NEAR = 9
"""Blocks of a group and the one before it, which are kept anyway."""


def e4m3(x: Tensor, unit: Tensor) -> Tensor:
    return (x / unit).to(torch.float8_e4m3fn).float() * unit


class Ratings:
    """Scores of a group's sampled rows [heads, share, rows, D] against its keys [heads, n, D]."""

    def __init__(self, rows: Tensor, keys: Tensor, positions: Tensor) -> None:
        self.rows, self.keys, self.positions = rows, keys, positions
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


RATINGS: dict[str, Callable[[Ratings], Tensor]] = {
    "every key": Ratings.key,
    "every key, e4m3": Ratings.key_e4m3,
    "64 principal directions": lambda x: x.principal(64),
    "32 principal directions": lambda x: x.principal(32),
    "means of 2": lambda x: x.mean(2),
    "means of 4": lambda x: x.mean(4),
    "means of 8": lambda x: x.mean(8),
    "means of 4 and a deviation": lambda x: x.spread(4),
    "channel bounds of 4": lambda x: x.bound(4),
    "channel bounds of 16": lambda x: x.bound(16),
}


def main() -> None:
    """One record a rating and share."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--model", default="models/needle")
    given.add_argument("--tasks", nargs="+", default=["multikey", "key_value"])
    given.add_argument("--length", type=parse_length, default=1 << 14)
    given.add_argument("--groups", type=int, default=2, help="last ones of the prompt")
    given.add_argument("--taken", type=int, nargs="+", default=[16, 32, 48, 96])
    given.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.3])
    given.add_argument("--out", type=Path, default=None)
    options = given.parse_args()
    device = default_device()
    wanted: dict[float, int] = defaultdict(int)
    found: dict[tuple[str, float, int], int] = defaultdict(int)
    for task in options.tasks:
        for q, k, _ in captured(options.length, task=task, model=options.model):
            kv_heads, share = k.shape[1], q.shape[1] // k.shape[1]
            places = torch.cat([row_places(16, share) + 128 * t for t in range(4)], dim=1)
            last = k.shape[2] // GROUP
            for group in range(last - options.groups, last):
                positions = (places + group * GROUP).to(device)
                rows = q[0].float().unflatten(0, (kv_heads, share))
                rows = rows.gather(2, positions[None, :, :, None].expand(kv_heads, -1, -1, 128))
                sample = Ratings(rows, k[0, :, : (group + 1) * GROUP].float(), positions)
                far = torch.arange(sample.largest.shape[1], device=device)
                far = (far > 0) & (far < len(far) - NEAR)
                held = {at: (sample.largest >= at) & far for at in options.shares}
                for at, blocks in held.items():
                    wanted[at] += int(blocks.sum())
                for name, rate in RATINGS.items():
                    order = rate(sample).masked_fill(~far, -torch.inf).sort(descending=True)
                    for taken in options.taken:
                        best = order.indices[:, :taken]
                        for at, blocks in held.items():
                            found[name, at, taken] += int(blocks.gather(1, best).sum())
    recorder = Recorder(options.out)
    for name in RATINGS:
        for at in options.shares:
            shares = {n: round(found[name, at, n] / wanted[at], 3) for n in options.taken}
            base = {"op": "grouped_ratings", "rating": name, "tasks": options.tasks}
            base |= {"L": options.length, "share": at, "blocks": wanted[at]}
            recorder.write(base | {"found": shares})
            print(f"{name:28} share {at}: {shares} of {wanted[at]}", flush=True)


if __name__ == "__main__":
    main()
