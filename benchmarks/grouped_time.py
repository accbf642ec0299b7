"""Stages of the grouped method on the stand-in model's own q, k, v, widened to 32 and 8 heads.

python benchmarks/grouped_time.py --lengths 32k 128k --out benchmarks/results/grouped_time.jsonl
python benchmarks/grouped_time.py --data normal --rows 64 128 --lengths 8k 32k 128k 1m --no-dense
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from captured import TASK, Qkv, captured
from torch import Tensor

from minference.bench.baselines import dense_kernels
from minference.bench.records import Recorder
from minference.bench.timing import measure
from minference.lengths import length_argument
from minference.methods import Grouped
from minference.methods.base import Context
from minference.methods.spec import build_method, parse_methods
from minference.ops.attention.api import sparse_attention
from minference.ops.build import Layout, assemble
from minference.ops.groups.api import grouped_blocks, guard_blocks
from minference.ops.groups.plan import Plan
from minference.testing import default_device, layout_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listed(Grouped):
    """With the candidates and the rows asked for, at any length."""

    name: ClassVar[str] = "grouped_listed"

    def plan(self, layout: Layout, layer: int) -> Plan:
        given = {"rows": self.rows, "candidates": self.candidates}
        return dataclasses.replace(super().plan(layout, layer), **given)


def widened(inputs: Qkv, factor: int, times: int) -> Qkv:
    """Heads repeated `factor` times in memory; the whole repeated `times` times along the keys."""
    q, k, v = (x.repeat(1, factor, times, 1) for x in inputs)
    return q, k, v


def normal_inputs(length: int, heads: int, kv_heads: int, device: torch.device) -> Qkv:
    """Independent values: no row looks anything up, all lists are full."""
    generator = torch.Generator(device=device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (
        torch.randn(1, n, length, 128, generator=generator, device=device, dtype=dtype)
        for n in (heads, kv_heads, kv_heads)
    )
    return q * 1.5, k, v


def profiled(call: Callable[[], Any], device: torch.device) -> dict[str, object]:
    """GPU time of each kernel, how many kernels there are, how many torch operators asked for
    them, and how long the host is busy with a call."""
    from torch.profiler import ProfilerActivity, profile

    call()
    cuda = device.type == "cuda"
    begin = time.perf_counter()
    for _ in range(5):
        call()
    host = (time.perf_counter() - begin) * 200
    if cuda:
        torch.cuda.synchronize()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as seen:
        call()
        if cuda:
            torch.cuda.synchronize()
    kernels: dict[str, list[float]] = {}
    for event in seen.events() or ():
        if event.device_type.name == "CUDA" and not event.name.startswith(("cu", "Activity")):
            kernels.setdefault(event.name[:60], []).append(event.time_range.elapsed_us() / 1e3)
    operators = [e for e in seen.events() or () if e.name.startswith("aten::")]
    return {
        "host_ms": round(host, 4),
        "gpu_ms": round(sum(map(sum, kernels.values())), 4),
        "kernels": {name: round(sum(ms), 4) for name, ms in kernels.items()},
        "launches": sum(map(len, kernels.values())),
        "operators": len(operators),
    }


def stages(
    method: Grouped, q: Tensor, k: Tensor, v: Tensor, layer: int
) -> dict[str, Callable[[], Any]]:
    """What a layer does, each stage on the last one's results, and all of it."""
    layout = layout_of(q[:1, :1], k[:1, :1])
    scale = q.shape[3] ** -0.5
    context = Context(layout, layer, tuple(range(q.shape[1])), scale)
    plan = method.plan(layout, layer)
    found = grouped_blocks(q, k, layout, plan, scale=scale)
    index = method.sparse_index(q, k, context)
    return {
        "estimate": lambda: grouped_blocks(q, k, layout, plan, scale=scale),
        "guard": lambda: guard_blocks(q, k, *found, layout, target=method.target, scale=scale),
        "assemble": lambda: assemble(layout, k.shape[1], blocks=found[0], group_tiles=1),
        "index": lambda: method.sparse_index(q, k, context),
        "kernel": lambda: sparse_attention(q, k, v, index, scale=scale),
        "together": lambda: sparse_attention(
            q, k, v, method.sparse_index(q, k, context), scale=scale
        ),
    }


def facts(method: Grouped, q: Tensor, k: Tensor, layer: int) -> dict[str, object]:
    """Density of the index, and what the guard saw before and did."""
    layout = layout_of(q[:1, :1], k[:1, :1])
    scale = q.shape[3] ** -0.5
    context = Context(layout, layer, tuple(range(q.shape[1])), scale)
    index = method.sparse_index(q, k, context)
    pairs = int(index.blocks.count.sum()) * 128 * 64 / k.shape[1]
    lists, wider = grouped_blocks(q, k, layout, method.plan(layout, layer), scale=scale)
    seen = guard_blocks(q, k, lists, wider, layout, target=method.target, scale=scale)
    recall = seen.recall.flatten().float()
    quantiles = torch.quantile(recall, torch.tensor([0.01, 0.05, 0.5], device=recall.device))
    return {
        "density": round(2 * pairs / q.shape[2] ** 2, 5),
        "recall": round(float(recall.mean()), 4),
        "recall_p1_p5_p50": [round(x, 4) for x in quantiles.tolist()],
        "guarded": [round(float((seen.level == level).float().mean()), 4) for level in (1, 2)],
    }


def main() -> None:
    """One record a length, layer, number of rows and stage, and the dense kernels at each
    length."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--data", choices=["model", "normal"], default="model")
    given.add_argument("--model", default="models/needle")
    given.add_argument("--task", default=TASK)
    given.add_argument("--method", default="grouped")
    given.add_argument("--rows", type=int, nargs="+", default=None, help="instead of the method's")
    given.add_argument(
        "--candidates", type=int, nargs="+", default=None, help="of a group, rated by their keys"
    )
    given.add_argument("--lengths", type=length_argument, nargs="+", default=[1 << 15, 1 << 17])
    given.add_argument("--layers", type=int, nargs="+", default=None)
    given.add_argument("--widen", type=int, default=4)
    given.add_argument("--heads", type=int, nargs=2, default=[32, 8], help="of normal data")
    given.add_argument(
        "--longest", type=length_argument, default=1 << 17, help="then it is repeated"
    )
    given.add_argument("--calls", type=int, default=5)
    given.add_argument("--no-dense", dest="dense", action="store_false")
    given.add_argument("--out", type=Path, default=None)
    options = given.parse_args()
    given_method = build_method(parse_methods(options.method)[0], None)
    assert isinstance(given_method, Grouped)
    recorder, device = Recorder(options.out), default_device()
    for length in options.lengths:
        own = min(length, options.longest)
        base = {"op": "grouped", "method": options.method, "L": length}
        if options.data == "normal":
            base |= {"data": "normal values, q times 1.5"}
            inputs = [normal_inputs(length, *options.heads, device)]
        else:
            base |= {"task": options.task}
            inputs = captured(own, task=options.task, model=options.model)
        base |= {"dtype": str(inputs[0][0].dtype).removeprefix("torch.")}
        layers: Sequence[int] = options.layers or range(len(inputs))
        if options.data == "normal":
            # they stand for a layer behind the early ones
            layers, inputs = [given_method.early], [inputs[0]] * (given_method.early + 1)
        for layer in layers:
            q, k, v = inputs[layer]
            if options.data == "model":
                q, k, v = widened(inputs[layer], options.widen, length // own)
            size = {"layer": layer, "H": q.shape[1], "Hkv": k.shape[1], "D": q.shape[3]}
            for rows, candidates in itertools.product(
                options.rows or [given_method.rows], options.candidates or [None]
            ):
                method = dataclasses.replace(given_method, rows=rows)
                if candidates is not None:
                    fields = dataclasses.fields(method)
                    options_of = {x.name: getattr(method, x.name) for x in fields if x.init}
                    method = Listed(**options_of | {"candidates": candidates})
                plan = method.plan(layout_of(q[:1, :1], k[:1, :1]), layer)
                known = {
                    "rows": plan.rows,
                    "candidates": plan.candidates,
                    **facts(method, q, k, layer),
                }
                for stage, call in stages(method, q, k, v, layer).items():
                    times = measure(call, device, calls=options.calls).to_dict()
                    if stage == "index":
                        times |= profiled(call, device)
                    done = recorder.write(base | size | {"stage": stage} | times | known)
                    print(length, layer, stage, done["ms_p50"], "ms", known, flush=True)
                    if stage == "index":
                        print(" ", {k: v for k, v in times.items() if k[:2] != "ms"}, flush=True)
            if options.dense and layer == layers[0] and length <= options.longest:
                for name, kernel in dense_kernels(device).items():
                    try:
                        times = measure(partial(kernel, q, k, v), device, calls=3).to_dict()
                    except RuntimeError as error:
                        print(name, "refuses:", error)
                        continue
                    recorder.write(base | size | {"stage": f"dense {name}"} | times)
                    print(length, layer, name, times["ms_p50"], "ms", flush=True)


if __name__ == "__main__":
    main()
