"""The likelihood benchmark against sums written out, on the shipped model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from benchmarks import likelihood
from minference.eval.scoring import spread_tokens
from minference.eval.tasks import make_sample
from minference.integrations.transformers.load import load
from minference.methods import AShape, Dense

NEEDLE = Path(__file__).parents[2] / "models" / "needle"
pytestmark = pytest.mark.skipif(
    not list(NEEDLE.glob("*.safetensors")), reason="models/needle holds no weights here"
)


def test_a_method_is_compared_at_answers_and_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "TEXT", 50)
    model, tokenizer = load(str(NEEDLE))
    sample = make_sample("single", 2000, 0, "dev", num_questions=2, placement="spread")
    prompt = likelihood.Prompt(sample, tokenizer, model.device)
    dense, own = (prompt.read(model, method) for method in (Dense(), AShape(sink=64, local=128)))
    compared = prompt.compare(own, dense)
    ids, spans = spread_tokens(tokenizer, sample)
    with torch.inference_mode():
        logs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    nats = divergence = 0.0
    at = 0
    for a, z in spans:
        for place in range(a - 1, z - 1):
            torch.testing.assert_close(dense.answers[at], logs[place], atol=2e-4, rtol=1e-4)
            token = ids[place + 1]
            nats += float(dense.answers[at, token] - own.answers[at, token])
            rows = zip(dense.answers[at].tolist(), own.answers[at].tolist(), strict=True)
            divergence += sum(math.exp(x) * (x - y) for x, y in rows)
            at += 1
    assert compared.nats == pytest.approx(nats / 2, rel=1e-3)
    assert compared.answers == pytest.approx(divergence / 2, rel=1e-3)
    assert compared.answers > 0.1
    assert len(dense.text) == 50
    text = -sum(float(logs[i, ids[i + 1]]) for i in prompt.text.tolist()) / 50
    mine = -sum(
        float(row[ids[i + 1]]) for i, row in zip(prompt.text.tolist(), own.text, strict=True)
    )
    per_byte = math.log(2) * prompt.bytes
    assert compared.loss_bits == pytest.approx((mine / 50 - text) / per_byte, rel=1e-2, abs=1e-4)
    same = prompt.compare(dense, dense)
    assert (same.nats, same.answers, same.text_bits, same.right) == (0, 0, 0, same.dense_right)


def test_a_record_for_each_task_and_method(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    words = ["--length", "1500", "--tasks", "single", "--prompts", "2", "--questions", "1"]
    words += ["--methods", "dense", "a_shape:sink=8,local=64", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["likelihood.py", *words])
    likelihood.main()
    dense, sparse = map(json.loads, out.read_text().splitlines())
    assert (dense["method"], sparse["method"]) == ("dense", "a_shape:sink=8,local=64")
    assert dense["kl_text_bits"] == 0
    assert sparse["kl_text_bits"] > 0
    assert (sparse["prompts"], sparse["asked"], sparse["dense_right"]) == (2, 2, dense["right"])
    assert all(0 < share < 0.3 for share in sparse["density"])
