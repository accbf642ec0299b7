"""q, k and v of the shipped model on a development prompt: what the benchmarks of methods time."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from minference.eval.plan import SPREAD_QUESTIONS, draw
from minference.integrations.transformers import attach
from minference.integrations.transformers.load import load
from minference.methods import Dense
from minference.methods.base import Context

Qkv = tuple[Tensor, Tensor, Tensor]
MODEL = Path(__file__).parents[1] / "models" / "needle"
TASK = "multikey"
_ROOM = 4096
"""Shortest prompt that twelve questions fit in."""


def captured(
    length: int, *, task: str = TASK, model: str = str(MODEL), heads: float = math.inf
) -> list[Qkv]:
    """q [1, H, length, D], k and v of a layer each, of the first ones that together have so many
    query heads, on a prompt with questions over its end; on the device that models are loaded to.
    """
    loaded, tokenizer = load(model)
    questions = SPREAD_QUESTIONS if length >= _ROOM else 1
    text, _ = draw((task, length, 0, "dev", questions, "spread", None)).solved()
    ids = torch.tensor([tokenizer(text).input_ids])
    # what a generator leaves open comes in front: the questions are the last tokens
    ids = torch.cat([ids, ids], dim=1)[:, -length:].to(loaded.device)
    seen: list[Qkv] = []

    def observe(context: Context, q: Tensor, k: Tensor, v: Tensor) -> None:
        if len(seen) * q.shape[1] < heads:
            seen.append((q.clone(), k.clone(), v.clone()))

    with attach(loaded, Dense(), min_seq_len=0, observe=observe), torch.inference_mode():
        loaded(ids, use_cache=False, logits_to_keep=1)
    return seen
