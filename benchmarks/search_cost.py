"""How well the fitted cost model predicts: times of random candidates on the shipped model's own
queries, keys and values, beside what the model says.

python benchmarks/search_cost.py --lengths 32k 128k --out benchmarks/results/search_cost.jsonl

The heads of one layer are repeated to a common layer's 32 query and 8 key heads. The first record
holds the fitted weights and how long fitting took.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

from torch import Tensor

from minference.bench.records import Recorder
from minference.bench.timing import measure
from minference.eval.tasks import make_sample
from minference.head_patterns import default_patterns
from minference.integrations.transformers.load import load
from minference.lengths import length_argument
from minference.methods.base import Context
from minference.methods.minference import MInference
from minference.ops.attention.api import sparse_attention
from minference.ops.attention.dense import dense_attention
from minference.patterns import AShape, BlockSparse, Dense, Pattern, VerticalSlash
from minference.search.cost import CostModel, prompt_work
from minference.search.search import observe_layers
from minference.search.timing import LENGTHS, LayerShape, fit_timings
from minference.testing import context_for


def main() -> None:
    """A record of the fit, then one a length and candidate."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--model", default="models/needle")
    given.add_argument("--lengths", type=length_argument, nargs="+", default=[8192])
    given.add_argument("--fit-lengths", type=length_argument, nargs=2, default=list(LENGTHS))
    given.add_argument("--layer", type=int, default=3)
    given.add_argument("--repeat", type=int, default=4, help="heads of the layer, repeated")
    given.add_argument("--candidates", type=int, default=20)
    given.add_argument("--seed", type=int, default=0)
    given.add_argument("--out", type=Path, default=None)
    options = given.parse_args()
    recorder = Recorder(options.out)
    llm, tokenizer = load(options.model)
    config = llm.config
    shape = LayerShape(
        heads=config.num_attention_heads * options.repeat,
        kv_heads=config.num_key_value_heads * options.repeat,
        dim=config.head_dim,
        dtype=llm.dtype,
        device=llm.device,
    )
    began = time.perf_counter()
    timings = fit_timings(shape, options.fit_lengths)
    seconds = time.perf_counter() - began
    cost = CostModel(timings)
    recorder.write({"op": "search_fit", "seconds": round(seconds, 3), **timings.to_dict()})
    print(f"{seconds:.1f} s; {cost.describe()}, worst {timings.worst:.1%}")
    chosen = random_candidates(options.candidates, options.seed)
    for length in options.lengths:
        text = make_sample("key_value", length, 0).text(0)
        ids = tokenizer(text, return_tensors="pt").input_ids
        q, k, v, context = layer_of(llm, ids, options.layer, options.repeat)
        dense = measure(lambda: dense_attention(q, k, v, scale=context.scale), q.device).ms_p50  # noqa: B023
        base = {"length": ids.shape[1], "heads": shape.heads, "kv_heads": shape.kv_heads}
        told = timings.dense_seconds(shape.heads, ids.shape[1]) * 1e3
        recorder.write({"op": "search_cost", "pattern": str(Dense()), **base}
                       | {"kernel_ms": dense, "predicted_kernel_ms": told})  # fmt: skip
        errors = []
        for pattern in chosen:
            record = base | timed(pattern, q, k, v, context)
            heads = [pattern] * shape.heads
            kernel = timings.kernel_seconds(prompt_work(p, ids.shape[1]) for p in heads) * 1e3
            whole = timings.layer_seconds(heads, ids.shape[1]) * 1e3
            record |= {"predicted_kernel_ms": kernel, "predicted_ms": whole, "dense_ms": dense}
            record["row_cost"] = cost.row_cost(pattern, ids.shape[1])
            recorder.write({"op": "search_cost", **record})
            errors.append(abs(kernel / float(record["kernel_ms"]) - 1))  # type: ignore[arg-type]
        errors.sort()
        print(f"{length}: median error {errors[len(errors) // 2]:.1%}, worst {errors[-1]:.1%}")


def random_candidates(count: int, seed: int) -> list[Pattern]:
    """Patterns of the three kinds in turn, budgets drawn evenly on a log scale."""
    draw = random.Random(seed)

    def tokens(low: int, high: int) -> int:
        return round(low * (high / low) ** draw.random())

    makers = (
        lambda: AShape(tokens(64, 1024), tokens(512, 8192)),
        lambda: VerticalSlash(tokens(64, 4096), tokens(256, 6096)),
        lambda: BlockSparse(tokens(8, 128)),
    )
    return [makers[n % len(makers)]() for n in range(count)]


def layer_of(
    llm: object, ids: Tensor, layer: int, repeat: int
) -> tuple[Tensor, Tensor, Tensor, Context]:
    """A layer's call on a prompt, its heads repeated."""
    kept: dict[str, Tensor] = {}

    def see(context: Context, q: Tensor, k: Tensor, v: Tensor) -> None:
        if context.layer == layer:
            for name, x in (("q", q), ("k", k), ("v", v)):
                kept[name] = x.repeat(1, repeat, 1, 1).contiguous()
            layouts.append(context.layout)

    layouts: list = []
    observe_layers(llm, ids, see)  # type: ignore[arg-type]
    q = kept["q"]
    return q, kept["k"], kept["v"], context_for(layouts[0], q.shape[1], dim=q.shape[-1])


def timed(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, context: Context) -> dict[str, object]:
    """Milliseconds of the index and of the kernel where every head has the pattern."""
    method = MInference(patterns=default_patterns(1, q.shape[1], pattern))

    def build() -> object:
        return method.build_index(q, k, context)

    index = method.build_index(q, k, context)
    assert index is not None
    kernel = measure(
        lambda: sparse_attention(q, k, v, index, scale=context.scale), q.device, calls=5
    )
    built = measure(build, q.device, calls=5)
    return {"pattern": str(pattern), "index_ms": built.ms_p50, "kernel_ms": kernel.ms_p50}


if __name__ == "__main__":
    main()
