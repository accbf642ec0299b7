"""What is read off configurations: lengths with scaled positions, layers that differ."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from minference.errors import UnsupportedError
from minference.model_config import layer_configs, layers_and_heads, token_limit


def config(**fields: Any) -> Any:
    made = SimpleNamespace(**fields)
    made.get_text_config = lambda decoder: made
    return made


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 32_768),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}, 131_072),
        ({"rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 2048}, 32_768),
        ({"type": "linear", "factor": 2.0}, 65_536),
        ({"rope_type": "dynamic", "factor": 2.0}, None),
        (
            {
                "full_attention": {"rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_type": "default"},
            },
            262_144,
        ),
        (None, 32_768),
    ],
)
def test_scaled_positions_lengthen_what_a_model_takes(
    rope: dict[str, Any] | None, limit: int | None
) -> None:
    for name in ("rope_parameters", "rope_scaling"):
        assert token_limit(config(max_position_embeddings=32_768, **{name: rope})) == limit


def test_a_model_that_names_no_length_takes_any() -> None:
    assert token_limit(config(rope_parameters={"rope_type": "linear", "factor": 2.0})) is None


def test_layers_may_have_configurations_of_their_own() -> None:
    alike = config(num_hidden_layers=3, num_attention_heads=8)
    assert layer_configs(alike) == [alike] * 3
    assert layers_and_heads(alike) == (3, 8)
    layers = [SimpleNamespace(num_attention_heads=heads) for heads in (8, 4)]
    other = config(per_layer_attributes={"num_attention_heads"}, per_layer_config=layers)
    assert layer_configs(other) == layers
    with pytest.raises(UnsupportedError, match=r"got \[4, 8\]; use a method without patterns"):
        layers_and_heads(other)
