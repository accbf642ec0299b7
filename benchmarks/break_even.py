"""From which length on the sparse path wins: index, kernel and both beside the dense kernels.

    python benchmarks/break_even.py --out benchmarks/results/break_even.jsonl

A layer goes the way that the hosts send it: `Method.build_index`, then `sparse_attention`. Values
are random, so that the estimate spreads its budget and no pattern helps. The last record names the
shortest length from which on every case beats the best dense kernel.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from index_time import host_ms
from torch import Tensor

from minference.bench.attention import Shape, dense_records
from minference.bench.records import Recorder
from minference.bench.timing import measure
from minference.head_patterns import HeadPatterns, default_patterns
from minference.methods import MInference
from minference.methods.base import Context
from minference.ops.attention.api import sparse_attention
from minference.testing import default_device, layout_of

LENGTHS = (4096, 8192, 12288, 16384, 24576, 32768, 65536)
CASES = ("vs1", "gradientai/Llama-3-8B-Instruct-262k@5", "gradientai/Llama-3-8B-Instruct-262k@20")


def method_of(case: str, heads: int) -> tuple[MInference, int]:
    """The method and the layer of a case: vs1 (1000 columns, 6096 slashes) or TABLE@LAYER."""
    if case == "vs1":
        return MInference(patterns=default_patterns(1, heads)), 0
    table, layer = case.rsplit("@", 1)
    return MInference(patterns=HeadPatterns.from_pretrained(table)), int(layer)


def layer_calls(
    method: MInference, layer: int, qkv: tuple[Tensor, Tensor, Tensor], impl: str
) -> dict[str, Callable[[], object]]:
    """What one layer does: its index, its kernel on that index, and both."""
    q, k, v = qkv
    context = Context(
        layout_of(q[:1, :1], k[:1, :1]),
        layer,
        tuple(range(q.shape[1])),
        scale=q.shape[-1] ** -0.5,
        impl=impl,
    )
    index = method.build_index(q, k, context)
    assert index is not None

    def together() -> object:
        own = method.build_index(q, k, context)
        assert own is not None
        return sparse_attention(q, k, v, own, impl=impl)

    return {
        "index": lambda: method.build_index(q, k, context),
        "kernel": lambda: sparse_attention(q, k, v, index, impl=impl),
        "together": together,
    }


def crossing(best: dict[int, float], cases: dict[int, list[float]]) -> int | None:
    """The shortest length from which on no case is slower than the best dense kernel."""
    found = None
    for length in sorted(best, reverse=True):
        if max(cases[length]) > best[length]:
            break
        found = length
    return found


def main() -> None:
    """One record a length and case, one a dense kernel, and the crossing."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    given.add_argument("--cases", nargs="+", default=list(CASES))
    given.add_argument("--heads", type=int, default=32)
    given.add_argument("--kv-heads", type=int, default=8)
    given.add_argument("--dim", type=int, default=128)
    given.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    given.add_argument("--impl", default="auto")
    given.add_argument("--out", type=Path, default=None)
    options = given.parse_args()
    recorder, device = Recorder(options.out), default_device()
    sizes = {"heads": options.heads, "kv_heads": options.kv_heads, "dim": options.dim}
    best: dict[int, float] = {}
    taken: dict[int, list[float]] = {}
    for length in options.lengths:
        shape = Shape(length=length, dtype=getattr(torch, options.dtype), **sizes)
        qkv = shape.tensors(device)
        for record in dense_records(shape, qkv):
            recorder.write(record)
            if isinstance(ms := record.get("ms_p50"), float):
                best[length] = min(best.get(length, ms), ms)
        for case in options.cases:
            record = {"op": "layer", "case": case, "impl": options.impl, **shape.to_dict()}
            calls = layer_calls(*method_of(case, options.heads), qkv, options.impl)
            record |= {f"{part}_ms": measure(call, device).ms_p50 for part, call in calls.items()}
            record |= {
                f"{part}_host_ms": host_ms(call, device)
                for part, call in calls.items()
                if device.type == "cuda"
            }
            record["dense_ms"] = best[length]
            taken.setdefault(length, []).append(float(str(record["together_ms"])))
            recorder.write(record)
            print(
                f"{length} {case}: index {record['index_ms']}, kernel {record['kernel_ms']}, "
                f"together {record['together_ms']}, dense {best[length]} ms, host "
                f"{record.get('index_host_ms')} and {record.get('kernel_host_ms')} ms"
            )
        del qkv
    found = crossing(best, taken)
    recorder.write({"op": "crossing", "impl": options.impl, "length": found, **sizes})
    print(f"not slower than dense from {found} tokens on")


if __name__ == "__main__":
    main()
