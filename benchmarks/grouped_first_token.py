"""First token of a whole model's shape by `grouped` beside dense attention, what its layers look at
being the shipped model's own q and k.

python benchmarks/grouped_first_token.py --lengths 32k 128k \\
    --out benchmarks/results/prefill_grouped_h200.jsonl

Random weights attend to nothing in particular, and `grouped` would find nothing to leave out. So
every layer's q and k are overwritten, before its index is built, with those of the shipped model's
first layers side by side, as `peer_times.py` has them; values stay random. Copying is a part of its
own, `plant_s`, and counts in the first token's time. Otherwise as `minference bench prefill`.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

import torch
from peer_times import widened
from torch import Tensor

from minference.bench.prefill import DECODED, Plant, measure, summary
from minference.bench.records import Recorder
from minference.bench.shapes import SHAPES, ModelShape, shape_of
from minference.lengths import length_argument
from minference.methods import Dense, Grouped, Method
from minference.testing import default_device


def planting(shape: ModelShape, length: int, dtype: torch.dtype) -> Plant:
    """Overwrites q and k of any layer."""
    own_q, own_k, _ = (x.to(dtype) for x in widened(length, shape.heads))

    def plant(q: Tensor, k: Tensor) -> None:
        q.copy_(own_q)
        k.copy_(own_k)

    return plant


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--model", choices=list(SHAPES), default="llama-3-8b")
    given.add_argument("--lengths", type=length_argument, nargs="+", default=[1 << 15, 1 << 17])
    given.add_argument("--layers", type=int, default=None, help="the first layers only")
    given.add_argument("--out", type=Path, default=None)
    options = given.parse_args()
    recorder, shape = Recorder(options.out), shape_of(options.model, options.layers)
    device, dtype = default_device(), torch.bfloat16
    plants = {length: planting(shape, length, dtype) for length in options.lengths}
    model = shape.build(max(options.lengths) + DECODED + 1, device, dtype)
    methods: tuple[Method, ...] = (Dense(), Grouped())
    for length in sorted(options.lengths):
        ids = torch.randint(shape.vocabulary, (1, length)).to(device)
        for method in methods:
            plant = plants[length] if isinstance(method, Grouped) else None
            measure(model, ids, method, decoded=1, plant=plant, chunk_tokens=8192)
            gc.collect()
            record = measure(model, ids, method, plant=plant, chunk_tokens=8192)
            head = {"op": f"{method.name}_prefill", "model": options.model, "length": length}
            head |= {"layers": shape.layers, "dtype": "bfloat16", "chunk_tokens": 8192}
            print(summary(recorder.write(head | record)), flush=True)


if __name__ == "__main__":
    main()
