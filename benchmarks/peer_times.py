"""Index and kernel times of methods on the shipped model's own q, k and v, beside dense kernels.

python benchmarks/peer_times.py --length 32k 128k --out benchmarks/results/peer_times_h200.jsonl

python benchmarks/peer_times.py --table benchmarks/results/peer_times_h200.jsonl

The heads of the first layers that together make 32 query heads are put side by side, so that one
call has the shape of a layer of an 8B model with the content of a model that retrieves. Methods
that treat layers differently take it for layer 3; with --layer it is another one, in records of
their own ("early_layer" instead of "peer"). All methods of the accuracy table are timed unless some
are named; one that fails says why and costs the others nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch
from captured import TASK, Qkv, captured
from eval_table import METHODS
from torch.profiler import ProfilerActivity, profile

from minference.bench.attention import GATE, Shape, dense_records, gate_error, with_speedup
from minference.bench.records import Recorder
from minference.bench.timing import measure, peak_extra_bytes
from minference.index import SparseIndex
from minference.json_files import read_json_lines
from minference.lengths import length_argument
from minference.methods import Grouped, Method
from minference.methods.spec import build_method, parse_methods
from minference.ops._dispatch import resolve_impl
from minference.ops.attention.api import sparse_attention
from minference.testing import context_for, layout_of

LAYER = Grouped.early
"""The first layer that no method looks closer at."""


def widened(length: int, heads: int) -> Qkv:
    """q [1, heads, length, D], k and v: the model's first layers side by side."""
    found = captured(length, heads=heads)
    q, k, v = (torch.cat(x, dim=1) for x in zip(*found, strict=True))
    return q, k, v


def method_of(label: str, heads: int) -> Method:
    """The method as an evaluation of the shipped model has it: budgets that no search found."""
    text = SimpleNamespace(
        num_hidden_layers=LAYER + 1, num_attention_heads=heads, model_type="needle"
    )
    config = SimpleNamespace(get_text_config=lambda decoder: text)
    return build_method(parse_methods(label)[0], config)


def timed(
    label: str, qkv: Qkv, shape: Shape, impl: str, *, layer: int, calls: int, trace: bool
) -> dict[str, object]:
    """One method: its gate, then index, kernel and both."""
    q, k, v = qkv
    method = method_of(label, q.shape[1])
    layout = layout_of(q[:, :1], k[:, :1])
    context = context_for(layout, q.shape[1], layer=layer, dim=q.shape[3])

    def build() -> SparseIndex:
        index = method.build_index(q, k, context)
        assert index is not None
        return index

    index = build()
    served = resolve_impl(impl, q.device, q.dtype, q.shape[3])
    record: dict[str, object] = {"op": op_of(layer), "layer": layer, "method": label}
    record |= {"options": options_of(method), "impl": served, "task": TASK, **shape.to_dict()}
    error = gate_error(q, k, v, sparse_attention(q, k, v, index, impl=impl), index)
    record |= {"gate_error": error, "gate": error <= GATE[q.dtype], "density": index.density()}
    if not record["gate"]:
        return record
    record["index_ms"] = measure(build, q.device, calls=calls).ms_p50
    record["kernel_ms"] = measure(
        lambda: sparse_attention(q, k, v, index, impl=impl), q.device, calls=calls
    ).ms_p50
    times = measure(lambda: sparse_attention(q, k, v, build(), impl=impl), q.device, calls=calls)
    record |= {"together_ms": times.ms_p50, "together": asdict(times)}
    record["index_peak_extra_bytes"] = peak_extra_bytes(lambda: (build(), q[:0])[1], q.device)
    if trace:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            build()
        table = seen.key_averages().table(sort_by="self_device_time_total", row_limit=14)
        sys.stdout.write(table + "\n")
    return record


def op_of(layer: int) -> str:
    """What records are called."""
    return "peer" if layer == LAYER else "early_layer"


def options_of(method: Method) -> dict[str, object]:
    """Its numbers: what a label means may change."""
    plain = (int, float, str, type(None))
    return {key: x for key, x in vars(method).items() if isinstance(x, plain)}


def summary(record: dict[str, object]) -> str:
    """One line of a record."""
    names = (
        "op",
        "layer",
        "length",
        "impl",
        "method",
        "refused",
        "gate_error",
        "density",
        "index_ms",
    )
    names += ("kernel_ms", "together_ms", "ms_p50", "speedup", "speedup_over")
    return " ".join(f"{name} {record[name]}" for name in names if name in record)


def table(path: Path) -> str:
    """Records as a table in Markdown."""
    rows = ["| tokens | method | kernel | density | index | attention | both | speed-up |"]
    rows.append("|---" * 8 + "|")
    for record in read_json_lines(path):
        dense = record["op"] == "dense_attention"
        cells = [f"{record['length'] >> 10}K", "dense" if dense else f"`{record['method']}`"]
        cells.append(record.get("impl", "-"))
        cells.append("1.000" if dense else _cell(record.get("density"), "{:.3f}"))
        kernel = record.get("ms_p50") if dense else record.get("kernel_ms")
        both = kernel if dense else record.get("together_ms")
        times = [None if dense else record.get("index_ms"), kernel, both]
        cells += [_cell(ms, "{:.2f} ms") for ms in times]
        cells.append(
            record.get("refused")
            or ("wrong" if record.get("gate") is False else _cell(record.get("speedup"), "{:.2f}"))
        )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def main() -> int:
    """Times every method; 1 if any gate was red."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--length", type=length_argument, nargs="+", default=[1 << 15, 1 << 17])
    made.add_argument("--heads", type=int, default=32)
    made.add_argument("--methods", nargs="+", default=None, help="all of the accuracy table's")
    made.add_argument("--impl", default="auto")
    made.add_argument("--layer", type=int, choices=range(LAYER + 1), default=LAYER)
    made.add_argument("--calls", type=int, default=7, help="timed calls of each part")
    made.add_argument("--seconds", type=float, default=1e9, help="start nothing after that long")
    made.add_argument("--trace", action="store_true", help="print the longest parts of each index")
    made.add_argument("--out", type=Path, default=None, help="JSONL file to append to")
    made.add_argument("--table", type=Path, default=None, help="print a file's records")
    given = made.parse_args()
    if given.table is not None:
        sys.stdout.write(table(given.table) + "\n")
        return 0
    labels = given.methods or [spec.label for spec in parse_methods(METHODS)]
    labels = [label for label in labels if label != "dense"]
    recorder = Recorder(given.out)
    began, red = time.monotonic(), False

    def write(record: dict[str, object]) -> None:
        sys.stdout.write(f"{time.monotonic() - began:5.1f} s  {summary(record)}\n")
        sys.stdout.flush()
        recorder.write(record)

    for length in given.length:
        qkv = q, k, _ = widened(length, given.heads)
        sizes = {"heads": q.shape[1], "kv_heads": k.shape[1], "dim": q.shape[3]}
        shape = Shape(length=length, dtype=q.dtype, **sizes)
        dense: dict[str, float] = {}
        for record in dense_records(shape, qkv):
            if isinstance(ms := record.get("ms_p50"), float):
                dense[str(record["impl"])] = ms
            write(record)
        for label in labels:
            if time.monotonic() - began > given.seconds:
                sys.stdout.write(f"out of time: {label} at {length} and what follows\n")
                return int(red)
            try:
                how = {"layer": given.layer, "calls": given.calls, "trace": given.trace}
                record = timed(label, qkv, shape, given.impl, **how)
                record = with_speedup(record, dense)
            except Exception as error:
                text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                record = {"op": op_of(given.layer), "method": label, "refused": text}
                record |= shape.to_dict()
            write(record)
            red |= record.get("gate") is not True
    return int(red)


if __name__ == "__main__":
    sys.exit(main())
