"""The two functions that transformers calls: the mask of a forward, the attention of a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minference.errors import UnsupportedError
from minference.index import SparseIndex, real_bounds
from minference.integrations.transformers import _compat
from minference.integrations.transformers.state import State, find
from minference.log import info_once, warn_once
from minference.methods.base import Context
from minference.ops.attention.api import sparse_attention
from minference.ops.attention.dense import dense_attention
from minference.ops.build import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NAME = "minference"


def mask(
    *,
    config: PreTrainedConfig,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: object = None,
    attention_mask: Tensor | None = None,
    **rest: Any,  # noqa: ANN401
) -> Tensor | None:
    """The mask of a forward: None for plain causal, [B, seen] bool for a long padded prompt,
    else [B, 1, L, N] bool as for SDPA.

    A static cache is longer than what it holds: the width of a 2-D mask says how many keys count.
    """
    written = {
        **rest,
        "config": config,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
    }
    long = q_length > 1 and find(config).sparse(q_length, kv_length, _type(rest.get("device")))
    if not _compat.is_causal_mask(mask_function):
        if long:
            info_once("packed, windowed or overlaid layers keep their own dense attention")
        return _compat.written_mask(**written)
    if isinstance(q_offset, Tensor) and not long:
        return _compat.written_mask(**written)
    seen = int(q_offset) + q_length - kv_offset
    keep = None
    if attention_mask is not None and not bool(attention_mask[:, :seen].all()):
        keep = attention_mask[:, kv_offset : kv_offset + seen].bool()
        keep = nn.functional.pad(keep, (0, seen - keep.shape[1]))
    if keep is None and kv_length == seen:
        return None
    if not long:
        return _compat.written_mask(**written)
    if keep is None:
        device = rest.get("device")
        return torch.ones(int(rest["batch_size"]), seen, dtype=torch.bool, device=device)
    if bool(((keep[:, 1:] & ~keep[:, :-1]).sum(dim=1) + keep[:, 0] > 1).any()):
        info_once("padding inside a prompt: the forward is dense; pad at one end for sparse")
        return _compat.written_mask(**written)
    return keep


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,  # noqa: ANN401
) -> tuple[Tensor, None]:
    """Attention of a layer: sparse for a long causal prompt, else dense.

    Returns:
        [B, L, H, D] contiguous, and None in place of the weights.

    Raises:
        UnsupportedError: attention that is not causal.
    """
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise UnsupportedError(
            f"sparse prefill needs causal attention, and {type(module).__name__} is not; use "
            "attn_implementation='sdpa' for this model"
        )
    state = find(module.config)  # type: ignore[arg-type]
    state.calls += 1
    options = {
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "softcap": softcap or 0.0,
        "sinks": s_aux,
    }
    if attention_mask is not None and attention_mask.dim() == 4:
        out = dense_attention(
            query, key, value, mask=_boolean(attention_mask), dropout=dropout, **options
        )
        return out.transpose(1, 2).contiguous(), None
    if attention_mask is not None:
        key, value = (x[:, :, : attention_mask.shape[1]] for x in (key, value))
    index = None
    if _sparsely(state, module, query, key, dropout, attention_mask, kwargs.get("position_ids")):
        index = _index(state, module, query, key, attention_mask, options)
    if index is None:
        out = dense_attention(query, key, value, keep=attention_mask, dropout=dropout, **options)
    else:
        out = _sparse(query, key, value, index, state.impl, options)
    return out.transpose(1, 2).contiguous(), None


def _sparsely(
    state: State,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    dropout: float,
    keep: Tensor | None,
    positions: Tensor | None,
) -> bool:
    if not state.sparse(query.shape[2], key.shape[2], query.device.type):
        return False
    if dropout or (torch.is_grad_enabled() and query.requires_grad):
        warn_once(
            "dense attention: gradients are on and the sparse kernels have no backward; "
            "call the model under torch.no_grad()"
        )
        return False
    # one look a forward: the first layer's
    if module.layer_idx == 0 and keep is None and positions is not None and positions.dim() == 2:
        state.packed = bool((positions[:, 1:] <= positions[:, :-1]).any())
        if state.packed:
            info_once("packed sequences (position_ids restart) are dense; pass them one by one")
    return not state.packed


def _index(
    state: State,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    keep: Tensor | None,
    options: dict[str, Any],
) -> SparseIndex | None:
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    index = None
    if layer >= state.starting_layer:
        first, stop = real_bounds(query.shape[0], key.shape[2], query.device, keep)
        context = Context(
            layout=Layout(first, stop, query.shape[2], key.shape[2]),
            layer=layer,
            heads=tuple(range(query.shape[1])),
            scale=options["scale"],
            softcap=options["softcap"],
            impl=state.impl,
        )
        index = state.method.build_index(query, key, context)
    state.note(layer, index)
    return index


def _sparse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: SparseIndex,
    impl: str,
    options: dict[str, Any],
) -> Tensor:
    width = value.shape[-1]
    if width < key.shape[-1]:
        value = nn.functional.pad(value, (0, key.shape[-1] - width))
    return sparse_attention(query, key, value, index, impl=impl, **options)[..., :width]


def _boolean(given: Tensor) -> Tensor:
    return given if given.dtype == torch.bool else given == 0


def _type(device: torch.device | str | None) -> str:
    return torch.device("cpu" if device is None else device).type


_compat.register(NAME, attention, mask)
