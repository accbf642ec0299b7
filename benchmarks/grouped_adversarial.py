"""Prompts made to defeat the grouped method, at full length: predictions beside dense attention's,
density, kept mass, and how many groups its guard gave more blocks.

python benchmarks/grouped_adversarial.py --length 128k --out adversarial.jsonl
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import minference
from minference.bench.records import Recorder
from minference.eval.scoring import encode
from minference.eval.tasks import make_sample
from minference.index import Ragged
from minference.integrations.transformers.load import load
from minference.lengths import length_argument
from minference.methods import Dense
from minference.methods.base import Context
from minference.methods.grouped import Grouped
from minference.ops.attention.api import sparse_attention
from minference.ops.groups.guard import Guarded
from minference.testing import context_for, default_device, layout_of, random_qkv

KINDS = ("one far needle", "questions first", "repeated text", "random tokens")
LAST = 400
"""Tokens at the end whose predictions are compared."""


@dataclass(frozen=True, kw_only=True)
class Watched(Grouped):
    """The grouped method, which also notes what its guard did."""

    levels: list[Tensor] = field(default_factory=list)

    def guard(
        self, q: Tensor, k: Tensor, lists: Ragged, wider: Ragged, context: Context
    ) -> Guarded:
        done = super().guard(q, k, lists, wider, context)
        self.levels.append(done.level)
        return done

    def guarded(self) -> list[float]:
        """Share of the guarded rows whose group got its wider list, and every block."""
        levels = torch.cat([level.flatten() for level in self.levels])
        return [round(float((levels == level).float().mean()), 5) for level in (1, 2)]


def tokens_of(kind: str, length: int, tokenizer: Any, seed: int) -> Tensor:  # noqa: ANN401
    """A prompt of about that many tokens."""
    if kind == "random tokens":
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, (1, length), generator=generator)
    sample = make_sample("multikey", length - LAST, seed=seed, split="dev")
    question = sample.questions[0]
    text = {
        "one far needle": sample.prompt + question.solved,
        "questions first": question.prompt + sample.prompt + question.solved,
        "repeated text": sample.prompt[:200] * (length // 200),
    }[kind]
    return torch.tensor([encode(tokenizer, text, start=True)])


@torch.inference_mode()
def compared(model: Any, ids: Tensor) -> dict[str, object]:  # noqa: ANN401
    """Loss and agreement of the last predictions, and what was computed."""
    method = Watched(min_seq_len=0)
    best, losses, records = [], [], []
    for one in (Dense(), method):
        with minference.attach(model, one, record=True, recall_rows=32, dense_from=2.0) as handle:
            logits = model(ids, use_cache=False, logits_to_keep=LAST).logits[0].float()
            records = handle.records
        logs = logits.log_softmax(dim=-1)
        best.append(logs)
        losses.append(-logs[:-1].gather(1, ids[0, 1 - LAST :, None]).mean() / math.log(2))
    sure = best[0].amax(dim=-1) > math.log(0.9)
    agree = (best[0].argmax(dim=-1) == best[1].argmax(dim=-1))[sure]
    return {
        "tokens": ids.shape[1],
        "bits_dense": round(float(losses[0]), 4),
        "bits": round(float(losses[1]), 4),
        "sure": int(sure.sum()),
        "agree": round(float(agree.float().mean()), 4) if len(agree) else None,
        "density": [round(float(record["density"]), 4) for record in records],
        "recall": [round(float(record["recall"]), 4) for record in records],
        "guarded": method.guarded(),
    }


def uniform(length: int, device: torch.device) -> dict[str, object]:
    """Attention that is the same everywhere: no list keeps it, the guard must take every block."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = random_qkv(8, 2, length, dim=128, dtype=dtype, device=device)
    q = q * 0.01
    method = Watched()
    index = method.sparse_index(q, k, context_for(layout_of(q, k), 8, dim=128))
    out = sparse_attention(q, k, v, index).float()
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    ).float()
    late = slice(length // 2, None)
    error = (out[:, :, late] - dense[:, :, late]).norm() / dense[:, :, late].norm()
    return {
        "tokens": length,
        "output_error_late": round(float(error), 5),
        "density": [round(index.density(), 4)],
        "guarded": method.guarded(),
    }


def main() -> None:
    """One record a prompt."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--model", default="models/needle")
    given.add_argument("--length", type=length_argument, default=1 << 17)
    given.add_argument("--seed", type=int, default=3)
    given.add_argument("--out", type=Path, default=None)
    options = given.parse_args()
    device, recorder = default_device(), Recorder(options.out)
    model, tokenizer = load(options.model)
    base = {"op": "grouped_adversarial", "model": options.model, "L": options.length}
    for kind in KINDS:
        ids = tokens_of(kind, options.length, tokenizer, options.seed).to(device)
        done = recorder.write(base | {"prompt": kind} | compared(model, ids))
        print(kind, done, flush=True)
    done = recorder.write(base | {"prompt": "uniform attention"} | uniform(options.length, device))
    print("uniform attention", done, flush=True)


if __name__ == "__main__":
    main()
