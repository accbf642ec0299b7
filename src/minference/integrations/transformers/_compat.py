"""What this integration knows of transformers' inside, for 5.5 to 5.x; nothing else imports it."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    causal_mask_function,
    chunked_overlay,
    sdpa_mask,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

_FIELD = "_attn_implementation_internal"
_ROTARY = "apply_rotary_pos_emb"
_JOINED = sliding_window_causal_mask_function(1).__code__
_WINDOW = sliding_window_overlay(1).__code__
_CHUNKED = chunked_overlay(1, torch.zeros(1)).__code__


def register(name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Puts both functions under one name; without the second the host drops padding silently."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def implementation(config: PreTrainedConfig) -> str | None:
    """Name of the attention that models of this config object call."""
    return getattr(config, _FIELD, None)


def set_implementation(config: PreTrainedConfig, name: str | None) -> None:
    """Changes the attention of this config object alone, not of its sub-configs."""
    setattr(config, _FIELD, name)


def reaches_interface(model: PreTrainedModel) -> bool:
    """Whether the model's code looks its attention up in the interface."""
    return bool(model._can_set_attn_implementation())


def asks_once(model: PreTrainedModel) -> bool:
    """Whether no layer of a model asks the interface twice: a second call may need the queries of
    the first."""
    return all(_asked(type(module)) <= 1 for module in model.modules())


@functools.cache
def _asked(kind: type) -> int:
    try:
        return inspect.getsource(kind.forward).count("attention_interface(")  # type: ignore[attr-defined]
    except (OSError, TypeError):
        return 1


def is_causal_mask(function: object) -> bool:
    """Whether a mask function means plain causal: no window, packing or overlay."""
    return function is causal_mask_function


def window_of(function: object) -> int | None:
    """The window of a mask function that is a causal sliding window and nothing else, or None."""
    held = _causal_overlay(function, _WINDOW)
    return None if held is None else int(held[0])


def chunks_of(function: object) -> tuple[int, Tensor] | None:
    """The chunks of a mask function that is causal within them and nothing else, or None: their
    size, and for each batch row the place where the first one begins."""
    held = _causal_overlay(function, _CHUNKED)
    return None if held is None else (int(held[0]), held[1])


def _causal_overlay(function: object, overlay: types.CodeType) -> list[Any] | None:
    """What an overlay of that code holds, in the order of its variables' names, if the function is
    it and causality, and nothing else."""
    if getattr(function, "__code__", None) is not _JOINED:
        return None
    parts = _held(function)[0]
    if len(parts) != 2 or parts[1] is not causal_mask_function:
        return None
    return _held(parts[0]) if getattr(parts[0], "__code__", None) is overlay else None


def _held(function: Any) -> list[Any]:  # noqa: ANN401
    return [cell.cell_contents for cell in function.__closure__]


def written_mask(**arguments: Any) -> Tensor | None:  # noqa: ANN401
    """The mask of the host's SDPA path, [B, 1, L, N] bool, never left out."""
    arguments["allow_is_causal_skip"] = False
    return sdpa_mask(**arguments)


def with_rotary(
    module: nn.Module, change: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Callable[..., Any] | None:
    """The module's own forward, except that it looks its rotary application up changed.

    None for modules without one, and for those whose forward another library holds already.
    """
    forward = type(module).forward
    code = getattr(forward, "__code__", None)
    if code is None or _ROTARY not in code.co_names or "forward" in module.__dict__:
        return None
    # without the module's name, by which torch.compile would look names up in the module itself
    scope = {name: x for name, x in forward.__globals__.items() if name != "__name__"}
    changed = types.FunctionType(
        code,
        {**scope, _ROTARY: change(scope[_ROTARY])},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    changed.__kwdefaults__ = forward.__kwdefaults__
    return types.MethodType(changed, module)
