"""A model folder as commands load it: random weights, and the shipped tokenizer of bytes."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from minference.testing import tiny_model

NEEDLE = Path(__file__).parents[2] / "models" / "needle"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("qwen3").save_pretrained(folder)
    AutoTokenizer.from_pretrained(NEEDLE).save_pretrained(folder)
    return str(folder)
