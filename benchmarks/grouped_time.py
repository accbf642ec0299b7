"""Stages of the grouped method on the stand-in model's own q, k, v, widened to 32 and 8 heads.

python benchmarks/grouped_time.py --lengths 32k 128k --out benchmarks/results/grouped_time.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minference.bench.baselines import dense_kernels
from minference.bench.records import Recorder
from minference.bench.timing import measure
from minference.eval.plan import draw
from minference.lengths import parse_length
from minference.methods import Grouped
from minference.methods.base import Context
from minference.methods.spec import build_method, parse_methods
from minference.ops.attention.api import sparse_attention
from minference.ops.build import assemble
from minference.ops.groups.api import grouped_blocks, guard_blocks
from minference.testing import default_device, layout_of

Qkv = tuple[Tensor, Tensor, Tensor]
_NAME = "grouped_time"


def layer_inputs(folder: str, task: str, length: int, device: torch.device) -> list[Qkv]:
    """Every layer's q, k and v on a prompt of the development split."""
    from transformers import (
        AttentionInterface,
        AttentionMaskInterface,
        AutoModelForCausalLM,
        AutoTokenizer,
    )

    found: list[Qkv] = []

    def keep(
        _: torch.nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: None,
        scaling: float | None = None,
        **options: Any,  # noqa: ANN401
    ) -> tuple[Tensor, None]:
        found.append((q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(_NAME, keep)
    AttentionMaskInterface.register(_NAME, lambda *_, **__: None)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=_NAME)
    model = torch.nn.Module.to(loaded, device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    questions = 12 if length >= 1 << 14 else 1
    text, _ = draw((task, length - 16, 0, "dev", questions, "spread", None)).solved()
    ids = torch.tensor(tokenizer(text).input_ids[:length])[None].to(device)
    with torch.inference_mode():
        model(ids, use_cache=False, logits_to_keep=1)
    return found


def widened(inputs: Qkv, factor: int, times: int) -> Qkv:
    """Heads repeated `factor` times in memory; the whole repeated `times` times along the keys."""
    q, k, v = (x.repeat(1, factor, times, 1) for x in inputs)
    return q, k, v


def stages(method: Grouped, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Any]]:
    """What a layer does, each stage on the last one's results, and all of it."""
    layout = layout_of(q[:1, :1], k[:1, :1])
    scale = q.shape[3] ** -0.5
    context = Context(layout, 0, tuple(range(q.shape[1])), scale)
    found = grouped_blocks(q, k, layout, method.plan(layout), scale=scale)
    index = method.build_index(q, k, context)
    return {
        "estimate": lambda: grouped_blocks(q, k, layout, method.plan(layout), scale=scale),
        "guard": lambda: guard_blocks(q, k, *found, layout, target=method.target, scale=scale),
        "assemble": lambda: assemble(layout, k.shape[1], blocks=found[0], group_tiles=1),
        "index": lambda: method.build_index(q, k, context),
        "kernel": lambda: sparse_attention(q, k, v, index, scale=scale),
        "together": lambda: sparse_attention(
            q, k, v, method.build_index(q, k, context), scale=scale
        ),
    }


def facts(method: Grouped, q: Tensor, k: Tensor) -> dict[str, object]:
    """Density of the index, and what the guard saw before and did."""
    layout = layout_of(q[:1, :1], k[:1, :1])
    scale = q.shape[3] ** -0.5
    context = Context(layout, 0, tuple(range(q.shape[1])), scale)
    index = method.build_index(q, k, context)
    pairs = int(index.blocks.count.sum()) * 128 * 64 / k.shape[1]
    lists, wider = grouped_blocks(q, k, layout, method.plan(layout), scale=scale)
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
    """One record a length, layer and stage, and the dense kernels at each length."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--model", default="models/needle")
    given.add_argument("--task", default="multikey")
    given.add_argument("--method", default="grouped")
    given.add_argument("--lengths", type=parse_length, nargs="+", default=[1 << 15, 1 << 17])
    given.add_argument("--layers", type=int, nargs="+", default=None)
    given.add_argument("--widen", type=int, default=4)
    given.add_argument("--longest", type=parse_length, default=1 << 17, help="then it is repeated")
    given.add_argument("--calls", type=int, default=5)
    given.add_argument("--out", type=Path, default=None)
    options = given.parse_args()
    method = build_method(parse_methods(options.method)[0], None)
    assert isinstance(method, Grouped)
    recorder, device = Recorder(options.out), default_device()
    for length in options.lengths:
        own = min(length, options.longest)
        inputs = layer_inputs(options.model, options.task, own, device)
        base = {"op": "grouped", "method": options.method, "task": options.task, "L": length}
        base |= {"dtype": str(inputs[0][0].dtype).removeprefix("torch.")}
        for layer in options.layers or range(len(inputs)):
            q, k, v = widened(inputs[layer], options.widen, length // own)
            size = {"layer": layer, "H": q.shape[1], "Hkv": k.shape[1], "D": q.shape[3]}
            known = facts(method, q, k)
            for stage, call in stages(method, q, k, v).items():
                times = measure(call, device, calls=options.calls).to_dict()
                done = recorder.write(base | size | {"stage": stage} | times | known)
                print(length, layer, stage, done["ms_p50"], "ms", known, flush=True)
            if layer == (options.layers or [0])[0] and length <= options.longest:
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
