"""Calls with little work beside the dense kernels: few heads, small heads, short chunks.

    python benchmarks/small_calls.py --out benchmarks/results/small_calls_h100.jsonl

A call's fixed costs (launches, the host) do not shrink with its heads, its head dimension or its
queries, and dense attention's time does. q, k and v are the shipped model's own, its layers side by
side; head dimensions other than the model's are parts of a head, or two heads in one. Queries are
the last ones of the context. Methods are asked as a host asks: index, then attention.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from captured import Qkv, captured
from index_time import host_ms
from torch import Tensor

from minference.bench.baselines import dense_kernels
from minference.bench.records import Recorder
from minference.bench.timing import measure
from minference.head_patterns import default_patterns
from minference.lengths import length_argument
from minference.methods import Grouped, MInference
from minference.methods.base import Method
from minference.ops.attention.api import sparse_attention
from minference.ops.attention.dense import FLASH3, dense_attention, flash2, flash3, sdpa
from minference.testing import context_for, layout_of

SHAPES = (
    "4x1x128",
    "8x2x128",
    "16x4x128",
    "32x8x128",
    "32x32x128",
    "14x2x64",
    "32x8x64",
    "16x8x256",
)
CHUNKS = (0, 8192, 2048, 512, 128, 1)
"""Queries of a call; 0 is the whole context. A single one is asked of dense kernels alone."""
MORE_TO_IT = 1 << 15
"""Longest context at which padded calls and calls with sinks are timed."""
PADDING = 37


def methods(heads: int) -> dict[str, tuple[Method, int]]:
    """What is timed, and as which layer."""
    budgets = default_patterns(1, heads)
    return {
        "grouped": (Grouped(), Grouped.early),
        "grouped, early": (Grouped(), 1),
        "minference (1000, 6096)": (MInference(patterns=budgets), 0),
        "minference (250, 1524)": (MInference(patterns=budgets.scaled(1 / 4)), 0),
    }


def shaped(layers: list[Qkv], heads: int, kv_heads: int, dim: int) -> Qkv:
    """The layers' heads side by side, as often as it takes, with so many dimensions a head."""
    made = []
    for part, count in zip(zip(*layers, strict=True), (heads, kv_heads, kv_heads), strict=True):
        x = torch.cat(part, dim=1)
        times = max(1, dim // x.shape[3])
        x = torch.cat([x.roll(-n, dims=1) for n in range(times)], dim=3)[..., :dim]
        made.append(x.repeat(1, -(-count // x.shape[1]), 1, 1)[:, :count].contiguous())
    return made[0], made[1], made[2]


def dense(q: Tensor, k: Tensor) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Kernels for these lengths, and what the library serves dense calls with."""
    rows, keys = q.shape[2], k.shape[2]
    found = dict(dense_kernels(q.device)) if rows == keys else {}
    if q.is_cuda:
        found["fa2"] = flash2
        if FLASH3 is not None:
            found["fa3"] = partial(flash3, causal=True)
    if rows == 1:
        found["sdpa"] = partial(sdpa, backends=(), causal=False)
    found["library"] = dense_attention
    if keys <= MORE_TO_IT:
        keep = (torch.arange(keys, device=q.device) >= PADDING)[None]
        sinks = torch.zeros(q.shape[1], device=q.device)
        found["library, padded"] = partial(dense_attention, keep=keep)
        found["library, sinks"] = partial(dense_attention, sinks=sinks)
    return found


def dense_times(qkv: Qkv) -> dict[str, float]:
    """Milliseconds of each kernel that serves the call."""
    taken = {}
    for name, attend in dense(*qkv[:2]).items():
        try:
            taken[name] = measure(partial(attend, *qkv), qkv[0].device).ms_p50
        except RuntimeError as error:
            print(f"{name}: {str(error).splitlines()[0][:100]}")
    return taken


def cell(qkv: Qkv, name: str, method: Method, layer: int, calls: int) -> dict[str, object]:
    """Times of one method."""
    q, k, v = qkv
    layout = layout_of(q[:, :1], k[:, :1])
    context = context_for(layout, q.shape[1], layer=layer, dim=q.shape[3])

    def call() -> Tensor:
        index = method.build_index(q, k, context)
        assert index is not None
        return sparse_attention(q, k, v, index)

    times = measure(call, q.device, calls=calls)
    index = method.build_index(q, k, context)
    assert index is not None
    return {
        "method": name,
        "layer": layer,
        "together_ms": times.ms_p50,
        "host_ms": host_ms(call, q.device, calls=5),
        "density": index.density(),
    }


def times(qkv: Qkv, asked: dict[str, tuple[Method, int]], calls: int, recorder: Recorder) -> str:
    """Records one call's dense kernels and methods; a line that tells of them."""
    q, k, _ = qkv
    where = {"heads": q.shape[1], "kv_heads": k.shape[1], "dim": q.shape[3]}
    where |= {"context": k.shape[2], "queries": q.shape[2], "dtype": str(q.dtype)[6:]}
    dense_ms = dense_times(qkv)
    recorder.write({"op": "dense_call", **where, "dense_ms": dense_ms})
    told = [" ".join(map(str, where.values()))]
    told += [f"{name} {ms:.2f}" for name, ms in dense_ms.items()]
    for name, (method, layer) in asked.items():
        try:
            record = cell(qkv, name, method, layer, calls)
        except Exception as error:
            told.append(f"{name}: {error!r}"[:200])
            continue
        recorder.write({"op": "small_call", **where, **record, "dense_ms": dense_ms})
        told.append(f"{name} {record['together_ms']:.2f} ({record['host_ms']:.2f})")
    return " | ".join(told)


def main() -> None:
    """One record a shape, context, chunk and method, and one a dense kernel."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--shapes", nargs="+", default=list(SHAPES))
    made.add_argument(
        "--contexts", type=length_argument, nargs="+", default=[1 << n for n in (14, 15, 16, 17)]
    )
    made.add_argument("--chunks", type=int, nargs="+", default=list(CHUNKS))
    made.add_argument("--methods", nargs="*", default=None, help="all unless given")
    made.add_argument("--calls", type=int, default=7)
    made.add_argument("--seconds", type=float, default=1e9, help="start nothing after that long")
    made.add_argument("--out", type=Path, default=None)
    given = made.parse_args()
    recorder, began = Recorder(given.out), time.monotonic()
    layers = captured(max(given.contexts))
    for shape, context in itertools.product(given.shapes, given.contexts):
        heads, kv_heads, dim = map(int, shape.split("x"))
        last = slice(-context, None)
        parts = [(q[:, :, last], k[:, :, last], v[:, :, last]) for q, k, v in layers]
        q, k, v = shaped(parts, heads, kv_heads, dim)
        for chunk in given.chunks:
            if chunk >= context:
                continue
            if time.monotonic() - began > given.seconds:
                print(f"out of time before {shape} {context} {chunk}")
                return
            asked = methods(heads) if chunk != 1 else {}
            if given.methods is not None:
                asked = {name: asked[name] for name in given.methods if name in asked}
            told = times((q[:, :, -chunk:].contiguous(), k, v), asked, given.calls, recorder)
            print(f"{time.monotonic() - began:5.0f} s {told}", flush=True)


if __name__ == "__main__":
    main()
