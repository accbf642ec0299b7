"""Builds of the Hopper kernel, timed in turns.

    python benchmarks/hopper_variants.py --builds ARRIVING_LANES=1 ARRIVING_LANES=32 --out FILE
    python benchmarks/hopper_variants.py --precision fp8 --builds k_stages=2,v_stages=2 k_stages=4

A build is what ships with some fields of `Build` (lower case) or macros (upper case) set. One whose
output is not that of the shipped one is reported and not timed.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from minference.bench.attention import Shape
from minference.bench.cases import planted_index, vs1
from minference.bench.records import Recorder
from minference.bench.timing import measure
from minference.index_tiles import computed_pairs
from minference.lengths import length_argument
from minference.ops.attention.fp8 import PRECISIONS
from minference.ops.attention.hopper.compile import Build
from minference.ops.attention.hopper.launch import sparse_attention, tuned_build
from minference.testing import layout_of


def changed(build: Build, text: str) -> Build:
    """The build with `name=value,...` set."""
    pairs = [part.split("=") for part in text.split(",")]
    fields = {name: int(value) for name, value in pairs if name.islower()}
    extra = tuple(f"{name}={value}" for name, value in pairs if not name.islower())
    return replace(build, extra=extra, **fields)


def main() -> None:
    """One record a build: the median over the rounds."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--length", type=length_argument, default=1 << 17)
    given.add_argument("--dim", type=int, default=128)
    given.add_argument("--rounds", type=int, default=5)
    given.add_argument("--builds", nargs="+", default=["ARRIVING_LANES=1", "ARRIVING_LANES=32"])
    given.add_argument("--precision", choices=PRECISIONS, default="native")
    given.add_argument("--out", type=Path, default=None)
    options = given.parse_args()
    recorder, device = Recorder(options.out), torch.device("cuda")
    shape = Shape(length=options.length, dim=options.dim)
    qkv = shape.tensors(device)
    index = planted_index(vs1(options.length, shape.heads, 0), layout_of(qkv[0], qkv[1]))
    pairs, scale = int(computed_pairs(index, 0).sum()), options.dim**-0.5
    fp8 = options.precision == "fp8"
    shipped = tuned_build(options.dim, shape.dtype, fp8=fp8)
    builds = {name: changed(shipped, name) for name in options.builds}
    attend = partial(sparse_attention, *qkv, index, scale=scale, fp8=fp8)
    expected, _ = attend()
    good, times = [], {name: [] for name in builds}
    for name, build in builds.items():
        out, _ = attend(build=build)
        if torch.equal(out, expected):
            good.append(name)
        else:
            print(f"{name}: WRONG, not timed")
    for turn in range(options.rounds):
        for name in good[turn % len(good) :] + good[: turn % len(good)]:
            times[name].append(measure(partial(attend, build=builds[name]), device).ms_p50)
    for name in good:
        ms = sorted(times[name])[len(times[name]) // 2]
        record = {"op": "hopper_variant", "variant": name, "case": "vs1-seed0"}
        record |= {"precision": options.precision, **shape.to_dict()}
        record |= {"ms_p50": ms, "ms_rounds": times[name]}
        recorder.write(record | {"tflops": round(4 * options.dim * pairs / ms / 1e9, 1)})
        print(f"{name}: {ms} ms, {4 * options.dim * pairs / ms / 1e9:.1f} TFLOP/s, {times[name]}")


if __name__ == "__main__":
    main()
