"""Stages of the vertical-slash index, apart and together: time, host time, launches of each.

python benchmarks/index_time.py --lengths 8k 128k 1m --out benchmarks/results/index_time.jsonl
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from minference.bench.attention import Shape
from minference.bench.records import Recorder
from minference.bench.timing import measure
from minference.index import SparseIndex
from minference.lengths import length_argument
from minference.ops.build import Layout, assemble
from minference.ops.estimate.api import last_query_masses
from minference.ops.lines.api import Lines, best_lines
from minference.ops.select.lists import offset_budget
from minference.testing import default_device, layout_of


def stages(
    q: Tensor, k: Tensor, layout: Layout, columns: int, slashes: int, impl: str
) -> dict[str, Callable[[], object]]:
    """What a vertical-slash layer does before its kernel, each stage on the last one's results."""
    heads = q.shape[1]
    kept, budgets = (columns,) * heads, (offset_budget(slashes),) * heads
    call = (q, k, layout.first, layout.stop)

    def lines() -> Lines:
        return best_lines(*call, kept, budgets, impl=impl)

    def index(own: Lines) -> SparseIndex:
        offsets = own.offsets, own.offset_bits
        return assemble(layout, heads, offsets=offsets, columns=own.columns)

    chosen = lines()
    return {
        "estimate": lambda: last_query_masses(*call, impl=impl),
        "lines": lines,
        "assemble": lambda: index(chosen),
        "together": lambda: index(lines()),
    }


def host_ms(call: Callable[[], object], device: torch.device, calls: int = 20) -> float:
    """Time that the host is busy in one call, the queue empty before it: the median of `calls`."""
    taken = []
    for _ in range(calls):
        _wait(device)
        begin = time.perf_counter()
        call()
        taken.append((time.perf_counter() - begin) * 1e3)
    _wait(device)
    return round(sorted(taken)[calls // 2], 4)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def launches(call: Callable[[], object], device: torch.device) -> dict[str, list[float]] | None:
    """Kernels and copies that one call puts on the GPU, by name: how many, and their microseconds
    in all; None on the CPU."""
    if device.type != "cuda":
        return None
    call()
    _wait(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
        _wait(device)
    found: dict[str, list[float]] = {}
    for event in seen.events() or ():
        if event.device_type.name == "CUDA":
            own = found.setdefault(event.name[:80], [0, 0.0])
            own[0] += 1
            own[1] = round(own[1] + event.time_range.elapsed_us(), 1)
    return found


def main() -> None:
    """One record a length and stage."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument(
        "--lengths", type=length_argument, nargs="+", default=[1 << 13, 1 << 17, 1 << 20]
    )
    given.add_argument("--heads", type=int, default=32)
    given.add_argument("--kv-heads", type=int, default=8)
    given.add_argument("--dim", type=int, default=128)
    given.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    given.add_argument("--columns", type=int, default=1000)
    given.add_argument("--slashes", type=int, default=6096)
    given.add_argument("--impl", default="triton")
    given.add_argument("--out", type=Path, default=None)
    options = given.parse_args()
    recorder, device = Recorder(options.out), default_device()
    sizes = {"heads": options.heads, "kv_heads": options.kv_heads, "dim": options.dim}
    for length in options.lengths:
        shape = Shape(length=length, dtype=getattr(torch, options.dtype), **sizes)
        q, k, _ = shape.tensors(device)
        layout = layout_of(q[:1, :1], k[:1, :1])
        made = stages(q, k, layout, options.columns, options.slashes, options.impl)
        for stage, call in made.items():
            record = {"op": "index", "stage": stage, "impl": options.impl, **shape.to_dict()}
            record |= measure(call, device).to_dict()
            record["host_ms"] = host_ms(call, device)
            by_name = launches(call, device)
            if by_name is not None:
                record["launches"] = sum(int(n) for n, _ in by_name.values())
                record["gpu_us"] = round(sum(us for _, us in by_name.values()), 1)
                record["launched"] = by_name
            recorder.write(record)
            print(
                f"{length} {stage}: {record['ms_p50']} ms, host {record['host_ms']} ms, GPU "
                f"{record.get('gpu_us')} us in {record.get('launches')} launches"
            )


if __name__ == "__main__":
    main()
