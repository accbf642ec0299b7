"""What a method makes of the very tokens that dense attention read: answers, and the text before.

python benchmarks/likelihood.py --length 128k --methods grouped grouped:first_layer=1 \\
    --prompts 40 --seconds 200 --out benchmarks/results/likelihood_h200.jsonl

Right and wrong answers need thousands of questions to tell two methods apart that lose little; what
they think of the same answer tokens needs hundreds. Prompts are of the development split. A record
of each task and method: how much likelier dense attention finds an answer (nats, and their standard
error over prompts), how far the method's predictions are from dense attention's over the tokens of
an answer (nats) and over tokens of the text (bits a byte), and by how much its loss on that text is
higher (bits a byte).
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from captured import MODEL
from torch import Tensor

from minference.bench.records import Recorder
from minference.eval.plan import SPREAD_QUESTIONS, draw_all
from minference.eval.runner import measure_of
from minference.eval.scoring import answer_places, prefill, spread_tokens
from minference.eval.tasks.sample import Sample
from minference.integrations.transformers.load import load
from minference.lengths import length_argument
from minference.methods import Dense, Method
from minference.methods.spec import build_method, parse_methods

TEXT = 8192
"""Tokens of the text whose predictions are compared, spread at random."""


@dataclass(frozen=True)
class Thoughts:
    """Log-probabilities of every token at the places compared.

    Attributes:
        answers: at the tokens of all answers. [n, vocabulary]
        text: at tokens of the text. [n, vocabulary]
        density: share of the causal area computed, by layer.
    """

    answers: Tensor
    text: Tensor
    density: list[float]


@dataclass(frozen=True)
class Compared:
    """A method beside dense attention on one prompt; means over its questions or text tokens."""

    right: int
    dense_right: int
    asked: int
    nats: float
    answers: float
    text_bits: float
    loss_bits: float
    density: list[float]


class Prompt:
    """A prompt's tokens and the places at which methods are compared."""

    def __init__(self, sample: Sample, tokenizer: object, device: torch.device) -> None:
        ids, self.spans = spread_tokens(tokenizer, sample)
        self.tokens = torch.tensor(ids, device=device)
        begin = self.spans[0][0] - 1
        order = torch.randperm(begin, generator=torch.Generator().manual_seed(0))
        self.text = order[:TEXT].sort().values.to(device)
        self.answers = answer_places(self.spans).to(device)
        self.bytes = len(sample.prompt.encode()) / begin

    @torch.inference_mode()
    def read(self, model: torch.nn.Module, method: Method) -> Thoughts:
        places = torch.cat([self.answers, self.text])
        how = {"use_cache": False, "logits_to_keep": places, "recall_rows": 0}
        read = prefill(model, method, self.tokens, **how)
        logs = read.logits.float().log_softmax(-1)
        answers, text = logs.split([len(self.answers), len(self.text)])
        return Thoughts(answers, text, read.layers.density)

    def compare(self, own: Thoughts, dense: Thoughts) -> Compared:
        sizes = [z - a for a, z in self.spans]
        wanted = self.tokens[self.answers + 1]
        right, dense_right = (
            sum(int(part.all()) for part in (x.answers.argmax(-1) == wanted).split(sizes))
            for x in (own, dense)
        )
        per_byte = math.log(2) * self.bytes
        text = self.tokens[self.text + 1]
        loss = _taken(dense.text, text).mean() - _taken(own.text, text).mean()
        return Compared(
            right=right,
            dense_right=dense_right,
            asked=len(sizes),
            nats=float((_taken(dense.answers, wanted) - _taken(own.answers, wanted)).sum())
            / len(sizes),
            answers=float(_divergence(dense.answers, own.answers).sum()) / len(sizes),
            text_bits=float(_divergence(dense.text, own.text).mean()) / per_byte,
            loss_bits=float(loss) / per_byte,
            density=own.density,
        )


def _taken(logs: Tensor, tokens: Tensor) -> Tensor:
    return logs.gather(-1, tokens[:, None])[:, 0]


def _divergence(dense: Tensor, own: Tensor) -> Tensor:
    return (dense.exp() * (dense - own)).sum(-1)


def summed(found: list[Compared]) -> dict[str, object]:
    """A record of one task and method."""
    nats = [x.nats for x in found]
    error = statistics.stdev(nats) / len(nats) ** 0.5 if len(nats) > 1 else None

    def mean(name: str) -> float:
        return round(statistics.fmean(getattr(x, name) for x in found), 5)

    return {
        "prompts": len(found),
        "right": sum(x.right for x in found),
        "dense_right": sum(x.dense_right for x in found),
        "asked": sum(x.asked for x in found),
        "nats_to_dense": mean("nats"),
        "nats_error": error and round(error, 5),
        "kl_answers": mean("answers"),
        "kl_text_bits": mean("text_bits"),
        "bits_to_dense": mean("loss_bits"),
        "density": [
            round(statistics.fmean(x), 4) for x in zip(*(x.density for x in found), strict=True)
        ],
    }


def main() -> None:
    """Reads prompt after prompt with every method, then writes a record for each."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--model", default=str(MODEL))
    given.add_argument("--tasks", nargs="+", default=["multivalue"])
    given.add_argument("--length", type=length_argument, default=1 << 15)
    given.add_argument("--methods", nargs="+", default=["grouped"])
    given.add_argument("--first", type=int, default=0, help="seed of the first prompt")
    given.add_argument("--prompts", type=int, default=20, help="of a task")
    given.add_argument("--questions", type=int, default=SPREAD_QUESTIONS, help="of a prompt")
    given.add_argument("--seconds", type=float, default=1e9, help="start no prompt after that long")
    given.add_argument("--workers", type=int, default=0, help="processes that write prompts")
    given.add_argument("--out", type=Path, default=None)
    options = given.parse_args()
    model, tokenizer = load(options.model)
    specs = parse_methods(",".join(options.methods))
    methods = {spec.label: build_method(spec, model.config) for spec in specs}
    seeds = range(options.first, options.first + options.prompts)
    orders = [
        (task, options.length, seed, "dev", options.questions, "spread", None)
        for seed in seeds
        for task in options.tasks
    ]
    found: dict[tuple[str, str], list[Compared]] = defaultdict(list)
    stop = time.monotonic() + options.seconds
    for sample in draw_all(orders, measure_of(tokenizer), options.workers):
        if time.monotonic() > stop:
            break
        prompt = Prompt(sample, tokenizer, model.device)
        dense = prompt.read(model, Dense())
        for label, method in methods.items():
            found[sample.task, label].append(prompt.compare(prompt.read(model, method), dense))
    recorder = Recorder(options.out)
    for (task, label), compared in found.items():
        size = {"op": "likelihood", "task": task, "length": options.length, "first": options.first}
        record = size | {"method": label} | summed(compared)
        recorder.write(record)
        print(record, flush=True)


if __name__ == "__main__":
    main()
