"""Long-prompt mode: MLPs of one model instance run over a few tokens at a time, with an undo."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def chunk_token_wise(model: nn.Module, tokens: int) -> list[Callable[[], None]]:
    """Wraps the dense MLPs of a model; mixtures of experts stay whole.

    Returns:
        Functions that undo the wrapping.

    Raises:
        ValueError: fewer than one token.
    """
    if tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {tokens}")
    undo = []
    for module in model.modules():
        mlp = getattr(module, "mlp", None)
        if isinstance(mlp, nn.Module) and not hasattr(mlp, "experts"):
            undo.append(_wrap(mlp, tokens))
    return undo


def _wrap(mlp: nn.Module, tokens: int) -> Callable[[], None]:
    plain = mlp.forward
    own = mlp.__dict__.get("forward")

    def forward(x: Tensor) -> Tensor:
        if x.dim() != 3 or x.shape[1] <= tokens:
            return plain(x)
        return torch.cat([plain(part) for part in x.split(tokens, dim=1)], dim=1)

    def undo() -> None:
        if own is None:
            mlp.__dict__.pop("forward", None)
        else:
            mlp.forward = own

    mlp.forward = forward
    return undo
