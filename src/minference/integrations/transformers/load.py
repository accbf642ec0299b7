"""Load a model and its tokenizer for a command: device and dtype chosen, errors in one line."""

from __future__ import annotations

from typing import Any

import torch


def load(name: str, device: str | None = None) -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        name: hub id or path.
        device: where to; CUDA where there is one, else the CPU, unless given.

    Raises:
        ValueError: there is no such model, or it cannot be read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    # bfloat16 matrix products are slow on most CPUs
    dtype = torch.float32 if target == "cpu" else "auto"
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"model {name!r} cannot be loaded: {reason}; give the folder of a model, or a hub id "
            "that is cached or can be fetched"
        ) from error
    return model.to(target).eval(), tokenizer
