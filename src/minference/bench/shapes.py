"""Models of published shapes with random weights, made on the device that measures them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from minference.head_patterns import HeadPatterns, default_patterns

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a model and the published table whose budgets it is served with.

    Attributes:
        kind: model type of transformers.
        table: id of the table, None for the default pattern in every head.
        more: further settings of the configuration.
    """

    kind: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    dim: int
    vocabulary: int
    table: str | None
    more: dict[str, Any] = field(default_factory=dict)

    def config(self, positions: int) -> Any:  # noqa: ANN401
        """transformers' configuration for prompts of at most `positions` tokens."""
        from transformers import AutoConfig

        return AutoConfig.for_model(
            self.kind,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.dim,
            vocab_size=self.vocabulary,
            max_position_embeddings=positions,
            pad_token_id=None,
            eos_token_id=None,
            **self.more,
        )

    def patterns(self) -> HeadPatterns:
        """The first layers of the table."""
        if self.table is None:
            return default_patterns(self.layers, self.heads)
        own = HeadPatterns.from_pretrained(self.table)
        return replace(own, patterns=own.patterns[: self.layers], scores=None)

    def budgets(self) -> str:
        """How many heads have which pattern, the four most frequent ones."""
        kinds = Counter(str(pattern) for row in self.patterns().patterns for pattern in row)
        named = [f"{count} x {pattern}" for pattern, count in kinds.most_common(4)]
        others = kinds.total() - sum(count for _, count in kinds.most_common(4))
        return ", ".join([*named, *([f"{others} others"] if others else [])])

    def build(self, positions: int, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        """A model with random weights of seed 0, ready for inference."""
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(self.config(positions), dtype=dtype)
        return model.eval()


# fmt: off
SHAPES = {
    "llama-3-8b": ModelShape(
        kind="llama", hidden=4096, inner=14336, layers=32, heads=32, kv_heads=8, dim=128,
        vocabulary=128256, table="gradientai/Llama-3-8B-Instruct-262k",
    ),
    "qwen2.5-7b": ModelShape(
        kind="qwen2", hidden=3584, inner=18944, layers=28, heads=28, kv_heads=4, dim=128,
        vocabulary=152064, table="Qwen/Qwen2.5-7B-Instruct-1M",
    ),
    "glm-4-9b": ModelShape(
        kind="glm", hidden=4096, inner=13696, layers=40, heads=32, kv_heads=4, dim=128,
        vocabulary=151552, table="THUDM/glm-4-9b-chat-1m-hf", more={"attention_bias": True},
    ),
    "tiny": ModelShape(
        kind="llama", hidden=64, inner=128, layers=2, heads=2, kv_heads=1, dim=32,
        vocabulary=128, table=None,
    ),
}
# fmt: on


def shape_of(name: str, layers: int | None = None) -> ModelShape:
    """A shape by name, cut to its first `layers` layers if given.

    Raises:
        ValueError: an unknown name, or more layers than the shape has.
    """
    if name not in SHAPES:
        raise ValueError(f"model must be one of {', '.join(SHAPES)}, got {name!r}")
    shape = SHAPES[name]
    if layers is None:
        return shape
    if not 1 <= layers <= shape.layers:
        raise ValueError(f"layers of {name} must be 1 to {shape.layers}, got {layers}")
    return replace(shape, layers=layers)
