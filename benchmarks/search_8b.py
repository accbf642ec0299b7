"""Time and peak memory of a search on a model of a published shape with random weights, or on a
model with weights of its own and the prompts that `minference search` generates.

python benchmarks/search_8b.py --length 32k --out benchmarks/results/search_8b.jsonl
python benchmarks/search_8b.py --model models/needle --length 8k --spaces wide --no-growth \
  --out benchmarks/results/search_8k_cpu.jsonl

The time of a search does not depend on what the weights say, but for growth to a recall: random
weights spread their mass over everything, so that every head grows until it is dense, the most
rounds there can be.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minference.bench.prefill import synchronize
from minference.bench.records import Recorder
from minference.bench.shapes import SHAPES, shape_of
from minference.eval.tasks import make_sample
from minference.integrations.transformers.load import load
from minference.lengths import length_argument
from minference.search.search import Settings, search
from minference.search.space import SPACES
from minference.testing import default_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TASKS = ("key_value", "multikey")
"""The command's own."""


def main() -> None:
    """One record a space, with the choice alone and with growth."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--model", default="llama-3-8b", help=f"{', '.join(SHAPES)}, or a path")
    given.add_argument("--layers", type=int, default=None, help="the first layers only")
    given.add_argument("--length", type=length_argument, default=1 << 15)
    given.add_argument("--spaces", nargs="+", default=["paper", "wide"])
    given.add_argument("--recall", type=float, default=0.95, help="of the runs with growth")
    given.add_argument("--no-growth", action="store_true", help="only the choice")
    given.add_argument("--rows", type=int, default=64)
    given.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    given.add_argument("--out", type=Path, default=None)
    options = given.parse_args()
    device, recorder = default_device(), Recorder(options.out)
    began = time.perf_counter()
    model, prompts = given_model(options) if options.model in SHAPES else own_model(options)
    synchronize(device)
    built = time.perf_counter() - began
    config = model.config
    for space in options.spaces:
        for recall in (None,) if options.no_growth else (None, options.recall):
            settings = Settings(space=space, rows=options.rows, recall=recall)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            began, spent = time.perf_counter(), time.process_time()
            layer_ends: list[float] = []
            search(
                model,
                prompts,
                settings,
                on_layer=lambda _, layer, ends=layer_ends: ends.append(time.perf_counter()),
            )
            synchronize(device)
            seconds = time.perf_counter() - began
            gpu = device.type == "cuda"
            record: dict[str, object] = {"op": "search", "model": options.model, "recall": recall}
            record |= {"layers": config.num_hidden_layers, "heads": config.num_attention_heads}
            record |= {"kv_heads": config.num_key_value_heads, "prompts": len(prompts)}
            record |= {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
            record |= {"length": options.length, "space": space, "rows": options.rows}
            record |= {"candidates": len(SPACES[space]), "dtype": str(model.dtype)[6:]}
            record |= {"seconds": round(seconds, 3), "build_seconds": round(built, 3)}
            record["processor_seconds"] = round(time.process_time() - spent, 3)
            record["first_layer_seconds"] = round(layer_ends[0] - began, 3)
            record["peak_bytes"] = torch.cuda.max_memory_allocated(device) if gpu else None
            recorder.write(record)
            print(f"{space}, recall {recall}: {seconds:.1f} s, peak {record['peak_bytes']}")


def given_model(options: argparse.Namespace) -> tuple[PreTrainedModel, list[Tensor]]:
    """A shape with random weights and a prompt of random tokens."""
    shape = shape_of(options.model, options.layers)
    model = shape.build(options.length, default_device(), getattr(torch, options.dtype))
    generator = torch.Generator().manual_seed(0)
    return model, [torch.randint(shape.vocabulary, (1, options.length), generator=generator)]


def own_model(options: argparse.Namespace) -> tuple[PreTrainedModel, list[Tensor]]:
    """A model by its path, and the prompts that a search generates for it."""
    model, tokenizer = load(options.model)
    texts = [make_sample(task, options.length, 0, "dev").text(0) for task in TASKS]
    return model, [tokenizer(text, return_tensors="pt").input_ids for text in texts]


if __name__ == "__main__":
    main()
