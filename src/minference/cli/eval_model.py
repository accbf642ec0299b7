"""The model that the commands of `minference eval` ask: checked before its weights are read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minference.eval.runner import Subject

DEFAULT_MODEL = "models/needle"


def load_subject(name: str, device: str | None) -> Subject:
    """The model with its name and tokenizer."""
    from minference.eval.runner import Subject
    from minference.integrations.transformers.load import load

    _check_shipped(name)
    return Subject(name, *load(name, device))


def load_tokenizer(name: str) -> Any:  # noqa: ANN401
    """The tokenizer alone."""
    from minference.integrations.transformers.load import load_tokenizer

    _check_shipped(name)
    return load_tokenizer(name)


def token_limit(name: str) -> int | None:
    """Tokens that the model takes, by its configuration alone; None if it does not say."""
    from minference.integrations.transformers.load import load_config
    from minference.model_config import token_limit

    _check_shipped(name)
    return token_limit(load_config(name))


def checked_subject(name: str, device: str | None, lengths: Iterable[int]) -> Subject:
    """The model, loaded if it can be put there and takes prompts of these lengths in tokens."""
    from minference.eval.plan import check_length

    check_device(device)
    limit = token_limit(name)
    for length in lengths:
        check_length(length, limit)
    return load_subject(name, device)


def check_device(device: str | None) -> None:
    """Raises ValueError unless a tensor can be put there and read again, which is tried."""
    import torch

    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device {device!r} cannot be used: {reason}; name cpu, or cuda where there is a GPU"
        ) from error


def _check_shipped(name: str) -> None:
    if name == DEFAULT_MODEL and not Path(name).is_dir():
        raise ValueError(
            f"the model {name!r} of the repository is not here; run this in its folder, or name a "
            "model: minference eval MODEL ..."
        )
