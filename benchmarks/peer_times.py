"""Index and kernel times of block methods on the shipped model's own q, k and v.

python benchmarks/peer_times.py --length 128k --methods xattention:stride=16 flexprefill \
    --out benchmarks/results/peer_times.jsonl

python benchmarks/peer_times.py --table benchmarks/results/peer_times.jsonl

The heads of the first layers that together make 32 query heads are put side by side, so that one
call has the shape of a layer of an 8B model with the content of a model that retrieves.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from minference.bench.attention import gate_error
from minference.bench.records import Recorder
from minference.bench.timing import measure, peak_extra_bytes
from minference.eval.tasks import make_sample
from minference.index import BLOCK, TILE, SparseIndex
from minference.integrations.transformers import attach
from minference.lengths import parse_length
from minference.methods import AShape
from minference.methods.spec import build_method, parse_methods
from minference.ops._dispatch import resolve_impl
from minference.ops.attention.api import sparse_attention
from minference.ops.attention.dense import dense_attention
from minference.testing import context_for, default_device, layout_of

MODEL = Path(__file__).parents[1] / "models" / "needle"
GATE = 1e-2


def widened(length: int, heads: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """q [1, heads, length, D], k and v of the model on a prompt with many needles, layers side by
    side."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    sample = make_sample("multikey", length, 0, "dev", num_questions=1)
    ids = tokenizer(sample.prompt, return_tensors="pt").input_ids
    # room for a start token and for what a generator leaves open
    ids = torch.cat([ids, ids], dim=1)[:, :length].to(device)
    seen: list[tuple[Tensor, ...]] = []

    def observe(context: object, *tensors: Tensor) -> None:
        if len(seen) * model.config.num_attention_heads < heads:
            seen.append(tuple(x.clone() for x in tensors))

    # a cheap method: nobody reads what it computes
    with attach(model, AShape(), min_seq_len=0, observe=observe), torch.inference_mode():
        model(ids, use_cache=False, logits_to_keep=1)
    q, k, v = (torch.cat(x, dim=1) for x in zip(*seen, strict=True))
    return q, k, v


def pairs_of(index: SparseIndex) -> int:
    """Causal pairs of an index of lists by tile, for prompts of whole tiles."""
    tiles = index.heads * (index.q_len // TILE)
    blocks = int(index.blocks.count[:, :, : index.q_len // TILE].sum())
    return blocks * BLOCK * TILE - tiles * TILE * (TILE - 1) // 2


def timed(
    name: str, qkv: tuple[Tensor, Tensor, Tensor], impl: str, dense_ms: float, trace: bool
) -> dict[str, object]:
    """One method: its gate, then index, kernel and both."""
    q, k, v = qkv
    config = SimpleNamespace(get_text_config=lambda: None)
    method = build_method(parse_methods(name)[0], config)
    context = context_for(layout_of(q, k), q.shape[1], dim=q.shape[3])

    def build() -> SparseIndex:
        index = method.build_index(q, k, context)
        assert index is not None
        return index

    index = build()
    served = resolve_impl(impl, q.device, q.dtype, q.shape[3])
    record: dict[str, object] = {"op": "peer", "method": name, "impl": served}
    record |= {"length": q.shape[2], "heads": q.shape[1], "kv_heads": k.shape[1]}
    record["dim"] = q.shape[3]
    error = gate_error(q, k, v, sparse_attention(q, k, v, index, impl=impl), index)
    record |= {"gate_error": error, "gate": error <= GATE}
    area = q.shape[1] * q.shape[2] * (q.shape[2] + 1) // 2
    record["density"] = pairs_of(index) / area
    if not record["gate"]:
        return record
    record["index_ms"] = measure(build, q.device).ms_p50
    record["kernel_ms"] = measure(
        lambda: sparse_attention(q, k, v, index, impl=impl), q.device
    ).ms_p50
    together = measure(lambda: sparse_attention(q, k, v, build(), impl=impl), q.device).ms_p50
    record |= {"together_ms": together, "dense_ms": dense_ms, "speedup": dense_ms / together}
    record["index_peak_extra_bytes"] = peak_extra_bytes(lambda: (build(), q[:0])[1], q.device)
    if trace:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            build()
        table = seen.key_averages().table(sort_by="self_device_time_total", row_limit=14)
        sys.stdout.write(table + "\n")
    return record


def table(path: Path) -> str:
    """Records as a table in Markdown."""
    rows = ["| tokens | method | kernel | density | index | kernel alone | both | dense |"]
    rows.append("|---|---|---|---|---|---|---|---|")
    for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        times = [
            f"{record[f'{part}_ms']:.1f} ms" if record["gate"] else "wrong"
            for part in ("index", "kernel", "together", "dense")
        ]
        cells = [f"{record['length'] >> 10}K", f"`{record['method']}`", record["impl"]]
        rows.append("| " + " | ".join([*cells, f"{record['density']:.3f}", *times]) + " |")
    return "\n".join(rows)


def main() -> int:
    """Times every method; 1 if any gate was red."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--length", type=parse_length, nargs="+", default=[1 << 17])
    made.add_argument("--heads", type=int, default=32)
    made.add_argument("--methods", nargs="+", default=["xattention", "flexprefill"])
    made.add_argument("--impl", default="auto")
    made.add_argument("--trace", action="store_true", help="print the longest parts of each index")
    made.add_argument("--out", type=Path, default=None, help="JSONL file to append to")
    made.add_argument("--table", type=Path, default=None, help="print a file's records")
    given = made.parse_args()
    if given.table is not None:
        sys.stdout.write(table(given.table) + "\n")
        return 0
    device = default_device()
    recorder = Recorder(given.out)
    red = False
    for length in given.length:
        qkv = widened(length, given.heads, device)
        dense_ms = measure(lambda qkv=qkv: dense_attention(*qkv), device).ms_p50
        for name in given.methods:
            record = recorder.write(timed(name, qkv, given.impl, dense_ms, given.trace))
            red |= not record["gate"]
            shown = {key: record.get(key) for key in list(record)[:16] if key != "op"}
            sys.stdout.write(" ".join(f"{key} {value}" for key, value in shown.items()) + "\n")
            sys.stdout.flush()
    return int(red)


if __name__ == "__main__":
    sys.exit(main())
