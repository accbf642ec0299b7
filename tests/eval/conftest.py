"""A random model and a byte tokenizer: enough to run an evaluation in a second."""

from types import SimpleNamespace

import pytest
import torch

from minference.eval.runner import Subject
from minference.testing import tiny_model


class ByteTokenizer:
    """One token a byte, 300 before the first."""

    bos_token_id = 300

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        opening = [self.bos_token_id] if add_special_tokens else []
        return SimpleNamespace(input_ids=[*opening, *text.encode()])

    def decode(self, ids: torch.Tensor) -> str:
        return bytes(min(i, 255) for i in ids.tolist()).decode("latin-1")


@pytest.fixture
def subject() -> Subject:
    """A model of 4 layers with random weights, and its tokenizer."""
    model = tiny_model("qwen3")
    model.set_attn_implementation("sdpa")
    return Subject("tiny", model, ByteTokenizer())
