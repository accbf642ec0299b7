"""The published call, literally, through transformers.pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, pipeline

from minference import MInference
from minference.testing import tiny_model

NEEDLE = Path(__file__).parents[3] / "models" / "needle"
LONG = "The quick brown fox jumps over the lazy dog. " * 20


@pytest.mark.parametrize(("prompt", "max_length"), [("Hi there", 10), (LONG, 910)])
def test_the_published_call_works_as_written(prompt: str, max_length: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(NEEDLE)
    pipe = pipeline("text-generation", model=tiny_model(), tokenizer=tokenizer)
    how = {"max_length": max_length, "do_sample": False}
    expected = pipe(prompt, **how)
    patch = MInference("minference", "Qwen/Qwen2.5-7B-Instruct-1M")
    pipe.model = patch(pipe.model)
    assert pipe(prompt, **how) == expected
    assert expected[0]["generated_text"].startswith(prompt)
    assert len(expected[0]["generated_text"]) > len(prompt)
    pipe.model.minference.detach()


def test_the_published_call_prefills_sparsely() -> None:
    tokenizer = AutoTokenizer.from_pretrained(NEEDLE)
    pipe = pipeline("text-generation", model=tiny_model(), tokenizer=tokenizer)
    patch = MInference("a_shape", attn_kwargs={"sink": 4, "local": 64, "min_seq_len": 0})
    pipe.model = patch(pipe.model)
    seen: list[int] = []
    pipe.model.minference._state.on_layer = seen.append
    pipe(LONG, max_length=10, max_new_tokens=3)
    assert seen == [0, 1, 2, 3]
    pipe.model.minference.detach()
