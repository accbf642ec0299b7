"""Sparse attention of the `torch` implementation beside dense SDPA, on the CPU, index included.

python benchmarks/cpu_attention.py --out benchmarks/results/cpu_attention.jsonl

32K tokens, 8 query heads, 2 KV heads of 64, float32: random inputs with planted columns and slash
clusters, served by heads of mixed patterns. Dense attention counts at its best thread count.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from minference.bench.attention import GATE, gate_error
from minference.bench.records import Recorder
from minference.bench.timing import measure
from minference.head_patterns import HeadPatterns
from minference.methods.minference import MInference
from minference.ops.attention.api import sparse_attention
from minference.patterns import AShape, BlockSparse, VerticalSlash
from minference.testing import context_for, layout_of, planted_qkv, random_lines

DIM, HEADS, KV_HEADS = 64, 8, 2
PATTERNS = (
    VerticalSlash(600, 400),
    VerticalSlash(200, 600),
    VerticalSlash(300, 500),
    VerticalSlash(1000, 256),
    AShape(128, 1024),
    AShape(64, 1536),
    BlockSparse(16),
    BlockSparse(24),
)
CPU = torch.device("cpu")


def main() -> None:
    """Measures one seed after the other; dense and sparse of a seed in turn."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--length", type=int, default=32768)
    given.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given.add_argument("--out", type=Path, default=None)
    arguments = given.parse_args()
    recorder = Recorder(arguments.out)
    for seed in arguments.seeds:
        record = measure_seed(arguments.length, seed)
        recorder.write(record)
        shown = ("seed", "gate", "density", "dense_s", "sparse_s", "index_s", "speedup")
        print({name: record.get(name) for name in shown})


def measure_seed(length: int, seed: int) -> dict[str, object]:
    """One record: the gate, then seconds by number of threads and the ratio of the best."""
    lines = [
        random_lines(length, columns=150, clusters=4, width=60, band=600, seed=100 * seed + h)
        for h in range(HEADS)
    ]
    q, k, v = planted_qkv(lines, length, kv_heads=KV_HEADS, dim=DIM, seed=seed)
    method = MInference(patterns=HeadPatterns(patterns=(PATTERNS,)))
    context = context_for(layout_of(q, k), HEADS, dim=DIM)

    def build() -> object:
        return method.build_index(q, k, context)

    def sparse() -> torch.Tensor:
        index = method.build_index(q, k, context)
        assert index is not None
        out = sparse_attention(q, k, v, index, impl="torch")
        assert isinstance(out, torch.Tensor)
        return out

    def dense() -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    index = method.build_index(q, k, context)
    assert index is not None
    record: dict[str, object] = {"op": "cpu_attention", "impl": "torch", "seed": seed}
    record |= {"length": length, "heads": HEADS, "kv_heads": KV_HEADS, "dim": DIM}
    record |= {"dtype": "float32", "patterns": [repr(p) for p in PATTERNS]}
    record["density"] = round(index.density(), 4)
    record["gate_error"] = gate_error(q, k, v, sparse(), index)
    record["gate"] = record["gate_error"] <= GATE[torch.float32]
    if not record["gate"]:
        return record
    threads = range(1, (os.cpu_count() or 1) + 1)
    times: dict[str, dict[int, float]] = {"dense": {}, "sparse": {}, "index": {}}
    for count in threads:
        torch.set_num_threads(count)
        for name, call in (("sparse", sparse), ("dense", dense), ("index", build)):
            times[name][count] = round(measure(call, CPU, calls=3).ms_p50 / 1e3, 3)
    record |= {f"{name}_s_by_threads": own for name, own in times.items()}
    record |= {f"{name}_s": min(own.values()) for name, own in times.items()}
    record["speedup"] = round(min(times["dense"].values()) / min(times["sparse"].values()), 2)
    record["load_average"] = round(os.getloadavg()[0], 2)
    return record


if __name__ == "__main__":
    main()
