"""Builds of the Hopper kernel, timed in turns: the one that ships, and those named by macros.

    python benchmarks/hopper_variants.py --macros ARRIVING_LANES=1 ARRIVING_LANES=32 --out FILE

A build whose output differs from that of the shipped one is reported and not timed.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from minference.bench.attention import Shape
from minference.bench.cases import computed_pairs, planted_index, vs1
from minference.bench.records import Recorder
from minference.bench.timing import measure
from minference.lengths import parse_length
from minference.ops.attention.hopper.compile import Build
from minference.ops.attention.hopper.launch import ELEMENTS, sparse_attention
from minference.testing import layout_of


def main() -> None:
    """One record a build: the median over the rounds."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--length", type=parse_length, default=1 << 17)
    given.add_argument("--dim", type=int, default=128)
    given.add_argument("--rounds", type=int, default=5)
    given.add_argument("--macros", nargs="+", default=["ARRIVING_LANES=1", "ARRIVING_LANES=32"])
    given.add_argument("--out", type=Path, default=None)
    options = given.parse_args()
    recorder, device = Recorder(options.out), torch.device("cuda")
    shape = Shape(length=options.length, dim=options.dim)
    qkv = shape.tensors(device)
    index = planted_index(vs1(options.length, shape.heads, 0), layout_of(qkv[0], qkv[1]))
    pairs, scale = computed_pairs(index), options.dim**-0.5
    shipped = Build(options.dim, ELEMENTS[shape.dtype])
    builds = {name: replace(shipped, extra=(name,)) for name in options.macros}
    expected, _ = sparse_attention(*qkv, index, scale=scale)
    good, times = [], {name: [] for name in builds}
    for name, build in builds.items():
        out, _ = sparse_attention(*qkv, index, scale=scale, build=build)
        if torch.equal(out, expected):
            good.append(name)
        else:
            print(f"{name}: WRONG, not timed")
    for turn in range(options.rounds):
        for name in good[turn % len(good) :] + good[: turn % len(good)]:
            build = builds[name]
            call = lambda build=build: sparse_attention(*qkv, index, scale=scale, build=build)  # noqa: E731
            times[name].append(measure(call, device).ms_p50)
    for name in good:
        ms = sorted(times[name])[len(times[name]) // 2]
        record = {"op": "hopper_variant", "variant": name, "case": "vs1-seed0", **shape.to_dict()}
        record |= {"ms_p50": ms, "ms_rounds": times[name]}
        recorder.write(record | {"tflops": round(4 * options.dim * pairs / ms / 1e9, 1)})
        print(f"{name}: {ms} ms, {4 * options.dim * pairs / ms / 1e9:.1f} TFLOP/s, {times[name]}")


if __name__ == "__main__":
    main()
