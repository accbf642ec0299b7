"""One prompt, dense and sparse: the answers are the model's own, and the numbers add up."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from minference.eval import side_by_side
from minference.eval.runner import Subject
from minference.methods import AShape
from minference.testing import tiny_model

NEEDLE = Path(__file__).parents[2] / "models" / "needle"


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject("tiny", tiny_model("qwen3"), AutoTokenizer.from_pretrained(NEEDLE))


def test_a_hidden_fact_fits_the_length_and_has_its_answer(subject: Subject) -> None:
    prompt = side_by_side.hidden_fact(subject, 3000, seed=3, depth=0.5)
    ids = side_by_side.encode(subject, prompt.text, room=10)
    assert 2800 < ids.shape[1] <= 3001  # with <bos>
    assert prompt.expected is not None
    assert 0.3 < prompt.text.index(prompt.expected) / len(prompt.text) < 0.7
    assert side_by_side.hidden_fact(subject, 3000, seed=4) != prompt


def test_answers_are_those_of_generate(subject: Subject) -> None:
    ids = side_by_side.encode(subject, "some text and more of it, " * 20)
    dense = side_by_side.answer_densely(subject, ids, 5)
    whole = subject.model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=2)
    told = subject.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    assert dense.text == told.strip().split("\n")[0].strip()
    assert (dense.density, dense.layers) == (1.0, None)
    wide, narrow = (AShape(sink=64, local=n, min_seq_len=0) for n in (2048, 64))
    same, _ = side_by_side.answer_sparsely(subject, ids, 5, wide)
    assert side_by_side.compare(dense, same)["same_answer"]
    assert side_by_side.compare(dense, same)["max_logit_difference"] < 1e-3
    less, handle = side_by_side.answer_sparsely(subject, ids, 5, narrow)
    assert less.density == pytest.approx(sum(r["density"] for r in handle.records) / 4, abs=1e-3)
    assert less.to_dict()["density"] < 0.7
    assert side_by_side.compare(dense, less)["max_logit_difference"] > 0.01
    again = side_by_side.answer_densely(subject, ids, 5)
    assert torch.equal(again.logits, dense.logits)


@pytest.mark.parametrize(
    ("text", "message"), [(" \n", "prompt is empty"), ("a" * 4095, "4097 tokens.* takes 4096")]
)
def test_bad_prompts_are_named(subject: Subject, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        side_by_side.encode(subject, text, room=1)
