"""Every family through the one registered function: dense agrees with eager, and undo is whole."""

from __future__ import annotations

import pytest
import torch

import minference
from minference.head_patterns import default_patterns
from minference.methods import MInference
from minference.patterns import VerticalSlash
from minference.testing import tiny_model

FAMILIES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "glm",
    "glm4",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "qwen3_moe",
    "olmo2",
    "granite",
    "cohere2",
    "smollm3",
    "llama4_text",
    "glm4_moe",
    "ministral",
    "qwen3_next",
]
# tiny models of these families would hold sliding layers alone, which keep their own attention
OPTIONS = {
    "mistral": {"sliding_window": None},
    "ministral": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
}
LENGTH = 40


def everything(model: torch.nn.Module) -> MInference:
    """A method whose index covers every key, through the sparse path."""
    config = model.config
    shape = (config.num_hidden_layers, config.num_attention_heads)
    return MInference(patterns=default_patterns(*shape, VerticalSlash(4096, 4096)), min_seq_len=0)


def padded(side: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 320, (2, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    gone = slice(0, 7) if side == "left" else slice(LENGTH - 7, LENGTH)
    if side != "none":
        mask[1, gone] = 0
        ids[1, gone] = 2
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", FAMILIES)
def test_full_density_is_eager(family: str) -> None:
    model = tiny_model(family, **OPTIONS.get(family, {}))
    left = padded("left")
    with torch.no_grad():
        before = {side: model(**padded(side)).logits for side in ("left", "right", "none")}
        ids = model.generate(**left, max_new_tokens=5, do_sample=False)
        with minference.attach(model, everything(model), record=True, dense_from=2) as handle:
            for side, logits in before.items():
                real = padded(side)["attention_mask"].bool()
                torch.testing.assert_close(
                    model(**padded(side)).logits[real], logits[real], atol=1e-4, rtol=1e-4
                )
            assert handle.records
            assert torch.equal(model.generate(**left, max_new_tokens=5, do_sample=False), ids)
        assert torch.equal(model(**left).logits, before["left"])
