"""Trains the model in pieces: `python -m training.train --recipe full --minutes 9 --to FOLDER`.

A piece ends by its clock and leaves bf16 shards and state.json; `--resume FOLDER` goes on at that
step, with fresh optimizer moments and a short warm-up. Figures go to FOLDER/log.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.config import BOS, RECIPES, TINY_SHAPE, ModelShape, Recipe
from training.data import ANSWER, FILL, Batch, batches
from training.export import load_weights, save_weights
from training.model import Needle, attend
from training.muon import Muon

_FILL_WEIGHT = 0.1


@dataclass
class Trainer:
    """A model with its optimizers at a step of a recipe."""

    model: Needle
    recipe: Recipe
    device: torch.device
    start: int = 0

    def __post_init__(self) -> None:
        named = self.model.named()
        matrices = [p for name, p in named.items() if p.dim() == 2 and "embed" not in name]
        vectors = [p for name, p in named.items() if p.dim() == 1 or "embed" in name]
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(vectors, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)
        self.weight_table = torch.ones(256, device=self.device)
        self.weight_table[FILL] = _FILL_WEIGHT

    def step(self, batch: Batch, at: int) -> dict[str, Tensor]:
        """One update; returns sums on the device and the most likely tokens."""
        phase, factor = self.recipe.at(at)
        factor *= min(1.0, (at - self.start + 1) / self.recipe.warmup)
        targets = torch.from_numpy(batch.data).to(self.device, non_blocking=True).long()
        kinds = torch.from_numpy(batch.kinds).to(self.device, non_blocking=True)
        text = self.weight_table[kinds.long()]
        answers = (kinds >= ANSWER).float()
        tokens = F.pad(targets[:, :-1], (1, 0), value=BOS)
        losses = self.model(tokens, targets, text, answers)
        count = answers.sum()
        loss = losses.text / targets.numel()
        loss = loss + phase.answer_weight * losses.answers / count.clamp(min=1.0)
        loss.backward()
        for group in self.adam.param_groups:
            group["lr"] = self.recipe.vector_rate * factor
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self.muon.step(self.recipe.matrix_rate * factor, self.recipe.weight_decay)
        return {
            "text": losses.text.detach() / text.sum() / math.log(2),
            "answers": losses.answers.detach() / count.clamp(min=1.0) / math.log(2),
            "best": losses.best,
        }


def exact_by_task(batch: Batch, best: np.ndarray) -> dict[str, tuple[int, int]]:
    """Questions answered exactly and asked, by task, from teacher-forced predictions."""
    wrong = (best.reshape(batch.data.shape) != batch.data) & (batch.kinds >= ANSWER)
    missed = {(int(row), int(batch.kinds[row, at])) for row, at in np.argwhere(wrong)}
    counts: dict[str, tuple[int, int]] = {}
    for question, task in batch.tasks.items():
        right, asked = counts.get(task, (0, 0))
        counts[task] = (right + (question not in missed), asked + 1)
    return counts


def train(trainer: Trainer, folder: Path, *, minutes: float, workers: int, log_every: int) -> int:
    """Trains until the recipe or the time ends, saves, and returns the next step."""
    folder.mkdir(parents=True, exist_ok=True)
    began = last = time.monotonic()
    recipe, at = trainer.recipe, trainer.start
    with (folder / "log.jsonl").open("a") as log:
        for batch in batches(recipe, trainer.start, workers):
            seen = trainer.step(batch, at)
            at += 1
            if at % log_every == 0 or at == recipe.steps:
                record = _record(recipe, at, batch, seen)
                now = time.monotonic()
                record["seconds"] = round(now - began, 1)
                record["tokens_per_second"] = round(log_every * recipe.step_tokens / (now - last))
                last = now
                log.write(json.dumps(record) + "\n")
                log.flush()
                if at % (5 * log_every) == 0:
                    sys.stdout.write(json.dumps(record) + "\n")
                    sys.stdout.flush()
            if time.monotonic() - began > 60 * minutes:
                break
    save_weights(trainer.model.named(), folder)
    (folder / "state.json").write_text(json.dumps({"step": at, "steps": recipe.steps}) + "\n")
    return at


def _record(recipe: Recipe, at: int, batch: Batch, seen: dict[str, Tensor]) -> dict[str, object]:
    exact = exact_by_task(batch, seen["best"].cpu().numpy())
    return {
        "step": at,
        "length": recipe.at(at - 1)[0].length,
        "text_bits": round(seen["text"].item(), 4),
        "answer_bits": round(seen["answers"].item(), 4),
        "exact": {task: f"{right}/{asked}" for task, (right, asked) in sorted(exact.items())},
    }


def choose_attention(model: Needle, device: torch.device, length: int) -> None:
    """Leaves only the fastest fused attention switched on: flash or cuDNN, shared heads or not."""
    if device.type != "cuda":
        return
    timed: dict[tuple[str, bool], float] = {}
    for name in ("flash", "cudnn"):
        for repeat in (False, True):
            _only(name)
            try:
                timed[name, repeat] = _time_attention(device, length, repeat_kv=repeat)
            except RuntimeError as error:
                sys.stdout.write(f"{name}, repeated {repeat}, cannot run: {error}\n")
    if not timed:
        raise RuntimeError("no fused attention runs here: expected flash or cuDNN attention")
    name, model.repeat_kv = min(timed, key=lambda way: timed[way])
    _only(name)
    sys.stdout.write(f"attention ms at {length}: {timed}\n")


def _only(name: str) -> None:
    torch.backends.cuda.enable_flash_sdp(name == "flash")
    torch.backends.cuda.enable_cudnn_sdp(name == "cudnn")
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_math_sdp(False)


def _time_attention(device: torch.device, length: int, *, repeat_kv: bool) -> float:
    q, k, v = (
        torch.randn(
            1, length, heads, 128, device=device, dtype=torch.bfloat16, requires_grad=True
        ).transpose(1, 2)
        for heads in (8, 2, 2)
    )
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for event in events:
        event.record()
        out = attend(q, k, v, repeat_kv=repeat_kv)
        out.backward(torch.ones_like(out))
    events.append(torch.cuda.Event(enable_timing=True))
    events[-1].record()
    torch.cuda.synchronize()
    return round(events[1].elapsed_time(events[2]), 1)


def main() -> None:
    """Reads the command line and trains one piece."""
    parser = argparse.ArgumentParser(description="Train models/needle.")
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="full")
    parser.add_argument("--minutes", type=float, default=9.0, help="length of this piece")
    parser.add_argument("--to", type=Path, required=True, help="folder for weights and log")
    parser.add_argument("--resume", type=Path, help="folder of an earlier piece")
    parser.add_argument("--step", type=int, help="step to resume at, if not state.json's")
    parser.add_argument("--workers", type=int, default=14, help="data processes")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = RECIPES[options.recipe]
    torch.manual_seed(recipe.seed)
    shape = TINY_SHAPE if options.recipe == "tiny" else ModelShape()
    model = Needle(shape, compile_parts=device.type == "cuda").to(device)
    start = 0
    if options.resume:
        start = options.step
        if start is None:
            start = json.loads((options.resume / "state.json").read_text())["step"]
        for name, value in load_weights(options.resume).items():
            model.named()[name].data.copy_(value)
    choose_attention(model, device, min(65_536, recipe.step_tokens))
    trainer = Trainer(model, recipe, device, start)
    every = 5 if options.recipe == "probe" else 10
    train(trainer, options.to, minutes=options.minutes, workers=options.workers, log_every=every)


if __name__ == "__main__":
    main()
