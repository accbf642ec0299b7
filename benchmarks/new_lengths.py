"""Dense calls of lengths that were not seen before, as prompts and decoded tokens come.

    python benchmarks/new_lengths.py --out benchmarks/results/new_lengths_h100.jsonl

A kernel that is planned or compiled for each length is fast in a benchmark, which repeats one. Of
tokens that a model of Llama-3-8B's shape with fewer layers decodes behind a prompt, attached and
plain, each has a length of its own; of single calls the first of a length is timed, and the fastest
of some repetitions.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from minference.bench.records import Recorder
from minference.bench.shapes import SHAPES
from minference.bench.timing import once
from minference.integrations.transformers import attach
from minference.lengths import length_argument
from minference.ops.attention.dense import FLASH3, dense_attention, sdpa
from minference.testing import default_device

HEADS, KV_HEADS, DIM = 32, 8, 128
NEW = 4
"""Lengths of a call."""
MOST = 1 << 28
"""Scores of a head in calls of a whole prompt."""
PADDING = 9
LAYERS = 8
DECODED = 24


def torchs_choice(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """What torch takes when asked for nothing in particular, as transformers asks it."""
    if mask is not None:
        k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    return sdpa(q, k, v, (), mask=mask, causal=mask is None and q.shape[2] > 1)


def library(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """What the library takes, as an attached model asks it."""
    if mask is None or q.shape[2] == 1:
        return dense_attention(q, k, v, mask=mask)
    return dense_attention(q, k, v, keep=mask[:, 0, -1], holes=False)


def call_of(
    attend: Callable[..., Tensor], queries: int, keys: int, padded: bool, device: torch.device
) -> Callable[[], Tensor]:
    """A call on random values, with padding on the left if asked."""
    q, k, v = (
        torch.randn(1, heads, count, DIM, dtype=torch.bfloat16, device=device)
        for heads, count in ((HEADS, queries), (KV_HEADS, keys), (KV_HEADS, keys))
    )
    mask = None
    if padded:
        mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
        mask = mask.tril(keys - queries)
        mask[..., :PADDING] = False
    return partial(attend, q, k, v, mask)


def calls(lengths: list[int], device: torch.device) -> Iterator[dict[str, object]]:
    """Records of single calls; every kernel has lengths of its own."""
    kinds = {"torch's choice": (torchs_choice, 0), "library": (library, NEW)}
    cases = itertools.product(lengths, (False, True), (False, True), kinds.items())
    for length, whole, padded, (name, (attend, shorter)) in cases:
        if whole and length * length > MOST:
            continue
        first, again = [], []
        for keys in range(length - shorter, length - shorter - NEW, -1):
            call = call_of(attend, keys if whole else 1, keys, padded, device)
            first.append(once(call, device))
            again.append(min(once(call, device) for _ in range(3)))
        # the first length of all loads the kernels
        yield {
            "op": "new_length",
            "kernel": name,
            "context": length,
            "queries": length if whole else 1,
            "padded": padded,
            "new_ms": statistics.median(first[1:]),
            "again_ms": statistics.median(again),
        }


@torch.inference_mode()
def decoded(model: PreTrainedModel, length: int) -> float:
    """Milliseconds a token behind a prompt of random tokens."""
    ids = torch.randint(model.config.vocab_size, (1, length), device=model.device)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = partial(model, ids[:, :1], past_key_values=cache, use_cache=True)
    return statistics.median(once(token, model.device) for _ in range(DECODED))


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
    made.add_argument("--lengths", type=length_argument, nargs="+", default=usual)
    made.add_argument("--out", type=Path, default=None)
    given = made.parse_args()
    recorder, device = Recorder(given.out), default_device()
    for of in (models, calls):
        for record in of(given.lengths, device):
            recorder.write(record | {"flash3": FLASH3 is not None})
            print(record, flush=True)


if __name__ == "__main__":
    main()
