"""Prompts made to defeat the grouped method: the shipped model predicts nearly what it
does when dense. Short, so that every block is a candidate and only their mass decides."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import minference
from minference.eval.tasks import make_sample
from minference.methods.grouped import Grouped

NEEDLE = Path(__file__).parents[2] / "models/needle"
METHOD = Grouped(min_seq_len=0)
LENGTH = 2304


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(NEEDLE, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(NEEDLE)


def _ids(kind: str, tokenizer: Any) -> torch.Tensor:
    sample = make_sample("multikey", LENGTH, seed=3, split="dev")
    question = sample.questions[0]
    match kind:
        case "one far needle":
            text = sample.prompt + question.solved
        case "questions first":
            text = question.prompt + sample.prompt + question.solved
        case "repeated text":
            text = sample.prompt[:200] * (LENGTH // 200)
        case _:
            generator = torch.Generator().manual_seed(0)
            return torch.randint(0, 256, (1, LENGTH), generator=generator)
    return torch.tensor([tokenizer(text).input_ids])


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["one far needle", "questions first", "repeated text", "random tokens"]
)
@torch.inference_mode()
def test_predictions_stay_those_of_dense_attention(loaded: tuple[Any, Any], kind: str) -> None:
    model, tokenizer = loaded
    ids = _ids(kind, tokenizer)
    dense = _predictions(model, ids)
    with minference.attach(model, METHOD, record=True, recall_rows=16, dense_from=2.0) as handle:
        sparse = _predictions(model, ids)
        records = handle.records
    assert sum(record["density"] for record in records) / len(records) < 0.8
    assert min(record["recall"] for record in records) > 0.6
    losses = [float(-x[:-1].gather(1, ids[0, -399:, None]).mean()) for x in (dense, sparse)]
    assert losses[1] < 1.1 * losses[0] + 0.1
    sure = dense.amax(dim=-1) > math.log(0.9)
    agree = (dense.argmax(dim=-1) == sparse.argmax(dim=-1))[sure]
    assert float(agree.float().mean()) >= 0.97


def _predictions(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False, logits_to_keep=400).logits[0].log_softmax(dim=-1)
