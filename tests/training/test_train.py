"""A few steps on the CPU: the data, the model, the optimizer and resuming hang together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from minference.eval.tasks import make_sample
from training import data
from training.config import FULL, TINY, TINY_SHAPE, ModelShape
from training.data import ANSWER, Batch, make_batch
from training.export import load_weights
from training.model import Needle
from training.muon import orthogonalize
from training.train import Trainer, exact_by_task, train


def test_a_piece_stops_saves_and_goes_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    device = torch.device("cpu")
    trainer = Trainer(Needle(TINY_SHAPE), TINY, device)
    before = trainer.model.named()["model.layers.0.mlp.up_proj.weight"].detach().clone()
    assert train(trainer, tmp_path, minutes=0.0, workers=0, log_every=1) == 1
    assert json.loads((tmp_path / "state.json").read_text()) == {"step": 1, "steps": 5}
    after = load_weights(tmp_path)["model.layers.0.mlp.up_proj.weight"]
    assert not torch.equal(before.bfloat16(), after)
    again = Trainer(Needle(TINY_SHAPE), TINY, device, start=1)
    assert train(again, tmp_path, minutes=1.0, workers=0, log_every=1) == 5
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]


def test_loss_falls_on_one_batch() -> None:
    torch.manual_seed(0)
    recipe = replace(TINY, step_tokens=1024)
    trainer = Trainer(Needle(TINY_SHAPE), recipe, torch.device("cpu"))
    batch = make_batch(recipe, 0)
    bits = [trainer.step(batch, 0)["text"].item() for _ in range(8)]
    assert bits[-1] < bits[0] - 0.5


def test_a_batch_depends_on_the_step_alone() -> None:
    first, again, other = make_batch(TINY, 1), make_batch(TINY, 1), make_batch(TINY, 2)
    assert np.array_equal(first.data, again.data)
    assert np.array_equal(first.kinds, again.kinds)
    assert not np.array_equal(first.data, other.data)
    assert first.data.shape == (2, 1024)


def test_answers_are_marked_with_their_task() -> None:
    batch = make_batch(FULL, 950)
    assert batch.data.shape == (16, 8192)
    for (row, kind), task in batch.tasks.items():
        text = batch.data[row, batch.kinds[row] == kind].tobytes().decode()
        assert text.startswith(" ")
        assert text.endswith("\n")
        assert len(text) >= 4, task


def test_an_answer_that_the_rows_end_cuts_off_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = make_sample("key_value", 1024, 0, "train", num_questions=4, placement="end")
    monkeypatch.setattr(data, "_samples", lambda rng, phase: [sample])
    length = len(sample.solved()[0]) - 4
    row, kinds, tasks = data.make_row(Random(0), replace(FULL.at(0)[0], length=length))
    assert row.shape == kinds.shape == (length,)
    assert list(tasks) == [ANSWER, ANSWER + 1, ANSWER + 2]


def test_exact_by_task_counts_whole_answers() -> None:
    data = np.array([[5, 6, 7, 8, 9]], np.uint8)
    kinds = np.array([[1, ANSWER, ANSWER, ANSWER + 1, ANSWER + 1]], np.uint8)
    batch = Batch(data, kinds, {(0, ANSWER): "a", (0, ANSWER + 1): "b"})
    assert exact_by_task(batch, np.array([0, 6, 7, 8, 0])) == {"a": (1, 1), "b": (0, 1)}


def test_orthogonalize_moves_singular_values_near_one() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(3, 16, 48)))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_the_model_fits_its_size() -> None:
    assert ModelShape().parameters == sum(
        value.numel() for value in Needle(ModelShape()).named().values()
    )
    assert 2 * ModelShape().parameters < 31_500_000
