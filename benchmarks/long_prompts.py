"""Answers and logits of one prompt through each long-prompt mode, against the plain path.

python benchmarks/long_prompts.py --tokens 128k --out benchmarks/results/long_prompts_h100.jsonl

The yardstick of the logits is what bfloat16 itself does to the plain path: its distance from the
same path in float32. A mode that only chunks or moves memory must not be farther away than that.
"""

from __future__ import annotations

import argparse
import copy
import gc
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minference.bench.records import Recorder
from minference.eval import side_by_side
from minference.eval.runner import Subject
from minference.integrations.transformers import attach
from minference.integrations.transformers.load import load
from minference.lengths import length_argument
from minference.methods.spec import build_method, parse_method

NEW_TOKENS = 24


def answer(
    subject: Subject, ids: Tensor, method: str, mode: dict[str, Any]
) -> tuple[list[int], Tensor]:
    """Tokens after the prompt, and the logits of the first [V] and the last [V] of them."""
    built = build_method(parse_method(method), subject.model.config)
    with attach(subject.model, built, **mode):
        out: Any = subject.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    logits = torch.stack([out.logits[0][0], out.logits[-1][0]]).float()
    tokens = out.sequences[0, ids.shape[1] :].tolist()
    del out
    gc.collect()
    return tokens, logits


def distance(one: Tensor, other: Tensor) -> dict[str, float]:
    """Largest difference of the logits after the prompt and of those after the decoded tokens."""
    first, last = (one - other).abs().amax(dim=-1).tolist()
    return {"max_logit_difference": first, "max_logit_difference_decoded": last}


def main() -> None:
    """One record for each seed, method and mode."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--model", default="models/needle")
    given.add_argument("--tokens", type=length_argument, default=1 << 17)
    given.add_argument("--chunk-tokens", type=int, default=8192)
    given.add_argument("--methods", nargs="+", default=["minference", "dense"])
    given.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    given.add_argument("--no-fuse", action="store_true", help="where there is no C++ compiler")
    given.add_argument("--out", type=Path, default=None)
    options = given.parse_args()
    recorder = Recorder(options.out)
    subject = Subject(options.model, *load(options.model))
    # a copy: casting the model there and back would round what it keeps in float32
    exactly = Subject(options.model, copy.deepcopy(subject.model).float(), subject.tokenizer)
    dtype = subject.model.dtype
    chunked: dict[str, Any] = {"chunk_tokens": options.chunk_tokens}
    modes = {"plain again": {}, "chunks": chunked, "chunks, host": chunked | {"kv": "host"}}
    modes["chunks, host_fp8"] = chunked | {"kv": "host_fp8"}
    if not options.no_fuse:
        modes["chunks, fused, host"] = chunked | {"kv": "host", "fuse": True}
    for seed in options.seeds:
        prompt = side_by_side.hidden_fact(subject, options.tokens, seed)
        ids = side_by_side.encode(subject, prompt.text)
        for method in options.methods:
            tokens, plain = answer(subject, ids, method, {})
            _, exact = answer(exactly, ids, method, {})
            head = {"op": "long_prompt", "model": options.model, "method": method, "seed": seed}
            head |= {"tokens": ids.shape[1], "dtype": str(dtype).removeprefix("torch.")}
            head |= {"chunk_tokens": options.chunk_tokens, "new_tokens": len(tokens)}
            head["yardstick"] = distance(plain, exact)
            text = (
                subject.tokenizer.decode(tokens, skip_special_tokens=True)
                .strip()
                .split("\n")[0]
                .strip()
            )
            head |= {"answer": text, "right": text == prompt.expected}
            for name, mode in modes.items():
                got, logits = answer(subject, ids, method, mode)
                record = head | {"mode": name, "same_tokens": got == tokens}
                recorder.write(record | distance(logits, plain))
                far = distance(logits, plain)["max_logit_difference"]
                print(
                    f"seed {seed} {method} {name}: "
                    f"{'same' if got == tokens else 'OTHER'} {len(got)} tokens, logits off by "
                    f"{far:.4f} (bfloat16 by {head['yardstick']['max_logit_difference']:.4f}), "
                    f"answer {'right' if head['right'] else 'wrong'}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
