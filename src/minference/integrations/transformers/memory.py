"""How much memory a prompt needs before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from minference.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Memory:
    """Bytes of a prefill: weights, keys and values, and the largest layer's intermediates."""

    weights: int
    cache: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.activations


def estimate_memory(
    model: PreTrainedModel, tokens: int, *, batch: int = 1, chunk_tokens: int | None = None
) -> Memory:
    """Bytes that a prefill of `tokens` tokens a row takes, without temporary copies of kernels."""
    config = model.config.get_text_config(decoder=True)
    size = model.dtype.itemsize
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    mlp_tokens = tokens if chunk_tokens is None else min(tokens, chunk_tokens)
    hidden = 3 * config.hidden_size + 2 * (heads + kv_heads) * dim
    return Memory(
        weights=sum(p.numel() * p.element_size() for p in model.parameters()),
        cache=2 * config.num_hidden_layers * kv_heads * dim * tokens * batch * size,
        activations=batch
        * size
        * (tokens * hidden + 3 * mlp_tokens * (getattr(config, "intermediate_size", None) or 0)),
    )


def check_memory(model: PreTrainedModel, tokens: int, **options: int | None) -> Memory:
    """The estimate, or an error where it exceeds the model's GPU.

    Raises:
        UnsupportedError: the prompt cannot fit; the message says what would make it.
    """
    need = estimate_memory(model, tokens, **options)  # type: ignore[arg-type]
    if model.device.type == "cuda":
        have = torch.cuda.get_device_properties(model.device).total_memory
        if need.total > have:
            raise UnsupportedError(
                f"a prompt of {tokens} tokens needs about {need.total / 2**30:.1f} GiB (weights "
                f"{need.weights / 2**30:.1f}, cache {need.cache / 2**30:.1f}, activations "
                f"{need.activations / 2**30:.1f}) and the GPU has {have / 2**30:.1f}; use "
                "chunk_tokens=8192, kv_cache_cpu=True, or a shorter prompt"
            )
    return need
