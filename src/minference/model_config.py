"""What the configuration of a transformers model says of its layers and lengths. Floor 0."""

from __future__ import annotations

from typing import Any

from minference.errors import UnsupportedError


def token_limit(config: Any) -> int | None:  # noqa: ANN401
    """Tokens that a model of this configuration takes; None where it does not say, or where its
    rotary positions follow the prompt's length.

    Where positions are scaled it is at least the scaled length: a recipe such as Qwen2.5's adds
    YaRN's factor and leaves `max_position_embeddings` at what the model was trained with.
    """
    text = config.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None)
    scalings = [rope for rope in _scalings(text) if rope.get("factor")]
    if limit is None or any(_kind(rope) == "dynamic" for rope in scalings):
        return None
    lengths = [
        int(rope["factor"] * (rope.get("original_max_position_embeddings") or limit))
        for rope in scalings
    ]
    return max([limit, *lengths])


def _scalings(config: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    """How rotary positions are scaled, once or for each type of layer."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(given, dict):
        return []
    if _kind(given) is not None:
        return [given]
    return [rope for rope in given.values() if isinstance(rope, dict)]


def _kind(rope: dict[str, Any]) -> str | None:
    return rope.get("rope_type", rope.get("type"))


def layer_configs(config: Any) -> list[Any]:  # noqa: ANN401
    """The configuration of each layer of a text model, which may differ (Gemma 4's head dims)."""
    if getattr(config, "per_layer_attributes", None):
        return list(config.per_layer_config)
    return [config] * config.num_hidden_layers


def layers_and_heads(config: Any) -> tuple[int, int]:  # noqa: ANN401
    """Numbers of layers and of query heads of a text model.

    Raises:
        UnsupportedError: layers of different numbers of heads, which no table of patterns has.
    """
    layers = layer_configs(config)
    heads = {layer.num_attention_heads for layer in layers}
    if len(heads) > 1:
        raise UnsupportedError(
            f"patterns of heads need one number of heads in every layer, got {sorted(heads)}; use "
            "a method without patterns, such as 'grouped' or 'a_shape'"
        )
    return len(layers), heads.pop()
