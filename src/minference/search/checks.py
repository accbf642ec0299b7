"""What a search refuses, told before any work: by the prompts' lengths and by the model's
configuration alone, so that no weights are loaded in vain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import minference
from minference.errors import UnsupportedError
from minference.methods.dense import Dense
from minference.model_config import token_limit

LEAST_TOKENS = 512


def check_lengths(lengths: Sequence[int], config: Any) -> None:  # noqa: ANN401
    """Raises ValueError unless there are prompts and each fits.

    Args:
        lengths: tokens of each prompt.
        config: the text model's configuration.
    """
    if not lengths:
        raise ValueError("a search needs at least one prompt, got none")
    limit = token_limit(config) or max(lengths)
    if min(lengths) < LEAST_TOKENS:
        raise ValueError(
            f"a prompt needs at least {LEAST_TOKENS} tokens for its patterns to show, got "
            f"{min(lengths)}; give a longer text"
        )
    if max(lengths) > limit:
        raise ValueError(
            f"a prompt may have the {limit} tokens that the model takes, got {max(lengths)}; cut it"
        )


def check_config(config: Any) -> None:  # noqa: ANN401
    """Raises UnsupportedError if models of this configuration cannot be searched.

    The model is built without memory for its weights.

    Args:
        config: transformers' configuration.
    """
    from transformers import AutoModelForCausalLM

    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"a search serves decoder-only causal models, and {kind!r} is an encoder-decoder"
        )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise UnsupportedError(
            f"transformers has no causal language model of the type {kind!r}; a search needs one"
        ) from error
    with minference.attach(model, Dense()):
        check_model(model)


def check_model(model: torch.nn.Module) -> None:
    """Raises UnsupportedError unless the model's attention is causal, and there is some."""
    causal = [module.is_causal for module in model.modules() if isinstance(_causal(module), bool)]
    name = type(model).__name__
    if not causal:
        raise UnsupportedError(f"{name} has no attention layers that could be served sparsely")
    if not any(causal):
        raise UnsupportedError(
            f"the attention of {name} is not causal, and only causal attention is served sparsely"
        )
    types = getattr(model.config, "layer_types", None)
    if types and all("full" not in layer and layer != "attention" for layer in types):
        raise UnsupportedError(
            f"{name} has no layer of full causal attention to search, only {types[0]!r} and its "
            "like, which are served without patterns"
        )


def _causal(module: torch.nn.Module) -> object:
    return getattr(module, "is_causal", None)
