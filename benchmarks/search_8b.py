"""Time and peak memory of a search on a model of a published shape with random weights.

python benchmarks/search_8b.py --length 32k --out benchmarks/results/search_8b.jsonl

The time of a search does not depend on what the weights say, but for growth to a recall: random
weights spread their mass over everything, so that every head grows until it is dense, the most
rounds there can be.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from minference.bench.prefill import synchronize
from minference.bench.records import Recorder
from minference.bench.shapes import SHAPES, shape_of
from minference.lengths import parse_length
from minference.search.search import Settings, search
from minference.search.space import SPACES
from minference.testing import default_device


def main() -> None:
    """One record a space, with the choice alone and with growth."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--model", choices=list(SHAPES), default="llama-3-8b")
    given.add_argument("--layers", type=int, default=None, help="the first layers only")
    given.add_argument("--length", type=parse_length, default=1 << 15)
    given.add_argument("--spaces", nargs="+", default=["paper", "wide"])
    given.add_argument("--recall", type=float, default=0.95, help="of the runs with growth")
    given.add_argument("--rows", type=int, default=64)
    given.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    given.add_argument("--out", type=Path, default=None)
    options = given.parse_args()
    device, recorder = default_device(), Recorder(options.out)
    shape = shape_of(options.model, options.layers)
    began = time.perf_counter()
    model = shape.build(options.length, device, getattr(torch, options.dtype))
    synchronize(device)
    built = time.perf_counter() - began
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(shape.vocabulary, (1, options.length), generator=generator)
    for space in options.spaces:
        for recall in (None, options.recall):
            settings = Settings(space=space, rows=options.rows, recall=recall)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            began = time.perf_counter()
            layer_ends: list[float] = []
            search(
                model,
                [ids],
                settings,
                on_layer=lambda _, layer, ends=layer_ends: ends.append(time.perf_counter()),
            )
            synchronize(device)
            seconds = time.perf_counter() - began
            gpu = device.type == "cuda"
            record: dict[str, object] = {"op": "search", "model": options.model, "recall": recall}
            record |= {"layers": shape.layers, "heads": shape.heads, "kv_heads": shape.kv_heads}
            record |= {"length": options.length, "space": space, "rows": options.rows}
            record |= {"candidates": len(SPACES[space]), "dtype": options.dtype}
            record |= {"seconds": round(seconds, 3), "build_seconds": round(built, 3)}
            record["first_layer_seconds"] = round(layer_ends[0] - began, 3)
            record["peak_bytes"] = torch.cuda.max_memory_allocated(device) if gpu else None
            recorder.write(record)
            print(f"{space}, recall {recall}: {seconds:.1f} s, peak {record['peak_bytes']}")


if __name__ == "__main__":
    main()
