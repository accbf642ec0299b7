"""Dense scores of a model folder: `python -m training.evaluate --model FOLDER --to scores.jsonl`.

Teacher-forced greedy exact match, answer and closing newline, on held-out words, numbers and text;
one line of JSON for each question, and bits per byte of held-out text.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minference.eval.tasks import ONE_QUESTION, TASKS, Sample, Split, make_sample
from minference.eval.tasks.haystack import prose
from training.config import BOS

MAIN = ("single", "multikey", "key_value", "multivalue", "variable_tracking")
_LONG = (*MAIN, "needle_lines")


@dataclass(frozen=True)
class Cell:
    """One task at one length: so many prompts with so many questions each."""

    task: str
    length: int
    prompts: int
    questions: int

    def orders(self, split: Split) -> Iterator[tuple[str, int, int, Split, int]]:
        """Arguments of `draw`, one for each prompt."""
        for seed in range(self.prompts):
            yield self.task, self.length, seed, split, self.questions


def plan(lengths: list[int], prompts: int) -> list[Cell]:
    """Twelve questions on each of the prompts; one question on eight times as many up to 32K."""
    cells = []
    for length in lengths:
        tasks = _LONG if length > 32_768 else TASKS
        for task in tasks:
            if task in ONE_QUESTION:
                cells.append(Cell(task, length, 2 * prompts, 1))
                continue
            cells.append(Cell(task, length, prompts, 12))
            if length <= 32_768 and task in MAIN:
                cells.append(Cell(task, length, 8 * prompts, 1))
    return cells


def draw(order: tuple[str, int, int, Split, int]) -> Sample:
    """One sample; spread if it has several questions."""
    task, length, seed, split, questions = order
    placement = "spread" if questions > 1 else "end"
    return make_sample(task, length, seed, split, num_questions=questions, placement=placement)


def exact(model: Any, sample: Sample, device: torch.device) -> list[bool]:  # noqa: ANN401
    """Whether each question's answer is what greedy decoding gives."""
    text, spans = sample.solved()
    ids = encode(text, device)
    best = model(ids[None, :-1], use_cache=False).logits[0].argmax(-1)
    right = best == ids[1:]
    return [bool(right[span.start : span.stop].all()) for span in spans]


def bits_per_byte(
    model: Any,  # noqa: ANN401
    split: Split,
    length: int,
    windows: int,
    device: torch.device,
) -> float:
    """Mean over held-out windows of real text."""
    total = 0.0
    for seed in range(windows):
        ids = encode(prose(Random(f"bits/{seed}"), split, length), device)
        logits = model(ids[None, :-1], use_cache=False).logits[0]
        total += F.cross_entropy(logits.float(), ids[1:]).item() / math.log(2)
    return total / windows


def encode(text: str, device: torch.device) -> Tensor:
    """Token ids, [1 + bytes]: `<bos>` and the bytes."""
    return torch.tensor([BOS, *text.encode()], device=device)


@torch.inference_mode()
def evaluate(model: Any, cells: list[Cell], split: Split, to: Path, facts: dict[str, Any]) -> None:  # noqa: ANN401
    """Scores every cell and writes the JSONL, a line of facts first."""
    device = model.device
    scores: dict[tuple[str, int, int], list[bool]] = defaultdict(list)
    began = time.monotonic()
    with to.open("w") as out, ProcessPoolExecutor(8, get_context("spawn")) as pool:
        out.write(json.dumps({"record": "run", "split": split, **facts}) + "\n")
        for length in sorted({min(cell.length, 32_768) for cell in cells}):
            bits = bits_per_byte(model, split, length, 16, device)
            out.write(json.dumps({"record": "text", "length": length, "bits": round(bits, 4)}))
            out.write("\n")
            sys.stdout.write(f"bits per byte at {length}: {bits:.4f}\n")
        for cell in cells:
            for sample in pool.map(draw, cell.orders(split)):
                found = exact(model, sample, device)
                scores[cell.task, cell.length, cell.questions] += found
                for index, right in enumerate(found):
                    out.write(json.dumps(_record(sample, cell, index, right)) + "\n")
            found = scores[cell.task, cell.length, cell.questions]
            sys.stdout.write(
                f"{cell.length:>7} {cell.task:<18} {cell.questions:>2} a prompt "
                f"{sum(found) / len(found):.3f} of {len(found)}, "
                f"{time.monotonic() - began:.0f} s\n"
            )
            sys.stdout.flush()
            out.flush()


def _record(sample: Sample, cell: Cell, index: int, right: bool) -> dict[str, object]:
    depth = sample.questions[index].depth
    return {
        "record": "question",
        "task": sample.task,
        "length": sample.length,
        "questions": cell.questions,
        "seed": sample.seed,
        "index": index,
        "depth": None if depth is None else round(depth, 3),
        "exact": int(right),
    }


def main() -> None:
    """Reads the command line."""
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(description="Score a model folder, dense.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--lengths", default="32768,131072")
    parser.add_argument("--prompts", type=int, default=25)
    parser.add_argument("--split", choices=("dev", "heldout"), default="heldout")
    parser.add_argument("--commit", default="unknown")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).to(device)
    facts = {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "commit": options.commit,
        "command": " ".join(["python -m training.evaluate", *sys.argv[1:]]),
    }
    lengths = [int(length) for length in options.lengths.split(",")]
    evaluate(model.eval(), plan(lengths, options.prompts), options.split, options.to, facts)


if __name__ == "__main__":
    main()
