"""The shipped model: the example of the user's call, and the long-prompt mode."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import minference
from minference.eval.tasks import make_sample
from minference.head_patterns import default_patterns
from minference.methods import MInference

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "run_hf.py"
NEEDLE = ROOT / "models" / "needle"


@pytest.mark.slow
def test_the_example_finds_the_fact(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("run_hf", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    answer = example.main(["--seed", "1"])
    expected = re.search(r"expected '(.+)'", capsys.readouterr().out)
    assert expected is not None
    assert answer == expected[1]


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["host", "host_fp8"])
def test_the_shipped_model_answers_alike_in_the_long_prompt_mode(kv: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(NEEDLE, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(NEEDLE)
    sample = make_sample("multikey", 3000, 5)
    given = tokenizer(sample.text(0), return_tensors="pt")
    method = MInference(patterns=default_patterns(6, 8), min_seq_len=1024, budget_length=131_072)
    options = {"max_new_tokens": 12, "output_logits": True, "return_dict_in_generate": True}
    with minference.attach(model, method):
        plain = model.generate(**given, **options)
    with minference.attach(model, method, chunk_tokens=500, kv=kv):
        got = model.generate(**given, **options)
    assert torch.equal(got.sequences, plain.sequences)
    assert sample.questions[0].answer in tokenizer.decode(got.sequences[0, -12:])
    # the first token comes from the prompt's own exact keys, the others from the stored ones
    error = [(a - b).abs().max() for a, b in zip(got.logits, plain.logits, strict=True)]
    assert error[0] < 1e-3
    assert max(error) < (1e-3 if kv == "host" else 0.5)
