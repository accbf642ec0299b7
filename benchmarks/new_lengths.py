"""Dense calls of lengths that were not seen before, as prompts and decoded tokens come.

    python benchmarks/new_lengths.py --out benchmarks/results/new_lengths_h100.jsonl

A kernel that is planned or compiled for each length is fast in a benchmark, which repeats one. Of
each call the first of several lengths is timed, and the fastest of some repetitions; then tokens
that a model of Llama-3-8B's shape with fewer layers decodes behind a prompt, plain and attached.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from minference.bench.records import Recorder
from minference.bench.shapes import SHAPES
from minference.integrations.transformers import attach
from minference.lengths import parse_length
from minference.ops.attention.dense import FLASH3, dense_attention

HEADS, KV_HEADS, DIM = 32, 8, 128
NEW = 4
"""Lengths of a call."""
MOST = 1 << 28
"""Scores of a head in calls of a whole prompt."""
LAYERS = 8
DECODED = 24


def torchs_choice(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """What torch takes when asked for nothing in particular, as transformers asks it."""
    if mask is not None:
        k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    causal = mask is None and q.shape[2] > 1
    gqa = k.shape[1] != q.shape[1]
    return scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=gqa)


def library(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """What the library takes, as an attached model asks it."""
    if mask is None or q.shape[2] == 1:
        return dense_attention(q, k, v, mask=mask)
    return dense_attention(q, k, v, keep=mask[:, 0, -1], holes=False)


def waited(call: Callable[[], object]) -> float:
    """Milliseconds of the host until a call is done."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3


def calls(lengths: list[int], device: torch.device) -> Iterator[dict[str, object]]:
    """Records of single calls; every kernel has lengths of its own."""
    kinds = {"torch's choice": torchs_choice, "library": library}
    for length in lengths:
        for queries, padded in ((1, False), (1, True), (length, False), (length, True)):
            if queries * length > MOST:
                continue
            for number, (name, attend) in enumerate(kinds.items()):
                first, again = [], []
                for i in range(NEW):
                    keys = length - number * NEW - i
                    rows = min(queries, keys)
                    q, k, v = (
                        torch.randn(1, heads, count, DIM, dtype=torch.bfloat16, device=device)
                        for heads, count in ((HEADS, rows), (KV_HEADS, keys), (KV_HEADS, keys))
                    )
                    mask = None
                    if padded:
                        mask = torch.ones(1, 1, rows, keys, dtype=torch.bool, device=device)
                        mask = mask.tril(keys - rows)
                        mask[..., :9] = False
                    first.append(waited(lambda x=(q, k, v, mask), f=attend: f(*x)))
                    again.append(
                        min(waited(lambda x=(q, k, v, mask), f=attend: f(*x)) for _ in range(3))
                    )
                # the first length of all loads the kernels
                yield {
                    "op": "new_length",
                    "kernel": name,
                    "context": length,
                    "queries": queries,
                    "padded": padded,
                    "new_ms": statistics.median(first[1:]),
                    "again_ms": statistics.median(again),
                }


@torch.inference_mode()
def decoded(model: PreTrainedModel, length: int) -> float:
    """Milliseconds a token behind a prompt of random tokens."""
    ids = torch.randint(0, 1000, (1, length), device=model.device)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    times = [
        waited(lambda: model(ids[:, :1], past_key_values=cache, use_cache=True))
        for _ in range(DECODED)
    ]
    return statistics.median(times)


def models(lengths: list[int], device: torch.device) -> Iterator[dict[str, object]]:
    """Records of decoding."""
    config = replace(SHAPES["llama-3-8b"], layers=LAYERS).config(2 * max(lengths))
    with device:
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
    for length in lengths:
        record = {"op": "decode", "model": "llama-3-8b", "layers": LAYERS, "context": length}
        with attach(model):
            yield record | {"kernel": "library", "token_ms": decoded(model, length)}
        # other lengths: plans stay in the process
        other = length - 2 * DECODED
        yield record | {"kernel": "transformers' sdpa", "token_ms": decoded(model, other)}


def main() -> None:
    """One record a call and kernel, and one a model."""
    made = argparse.ArgumentParser(description=__doc__)
    usual = [1 << n for n in (11, 12, 13, 14, 15, 17)]
    made.add_argument("--lengths", type=parse_length, nargs="+", default=usual)
    made.add_argument("--out", type=Path, default=None)
    given = made.parse_args()
    recorder, device = Recorder(given.out), torch.device("cuda")
    for of in (models, calls):
        for record in of(given.lengths, device):
            recorder.write(record | {"flash3": FLASH3 is not None})
            print(record, flush=True)


if __name__ == "__main__":
    main()
