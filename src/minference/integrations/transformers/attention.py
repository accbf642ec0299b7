"""The two functions that transformers calls: the mask of a forward, the attention of a layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from minference.errors import UnsupportedError
from minference.index import TILE, SparseIndex, real_bounds
from minference.integrations.transformers import _compat, windows
from minference.integrations.transformers.coverage import covered_share
from minference.integrations.transformers.records import LayerRecord, kept
from minference.integrations.transformers.state import State, find
from minference.log import info_once, warn_once
from minference.methods.base import Context
from minference.methods.thresholds import most_share
from minference.ops.attention.api import even_head_dims, sparse_attention
from minference.ops.attention.dense import dense_attention, has_holes
from minference.ops.build import Layout

NAME = "minference"
_HIDDEN = -1e4
"""Added to a score, this and less hides a key: half precision begins at -65504."""
FOREIGN = ("position_bias", "indices", "block_indices")
"""What some models hand to attention and no kernel here takes part of: biases, chosen keys."""


def mask(**given: Any) -> Tensor | None:  # noqa: ANN401
    """The mask of a forward: None for plain causal, [B, seen] bool for a padded prompt that is long
    or on a GPU, [B, 1, 1, seen] integers for a long one's layers with a window or chunks, else
    [B, 1, L, N] bool as SDPA's.

    A static cache is longer than what it holds: the width of the first two says which keys count.

    Args:
        **given: what the host hands to every mask function, by keyword.
    """
    q_length, kv_length, function = (given[x] for x in ("q_length", "kv_length", "mask_function"))
    q_offset, kv_offset = given.get("q_offset", 0), given.get("kv_offset", 0)
    device = given.get("device")
    long = q_length > 1 and find(given["config"]).sparse(q_length, kv_length, _type(device))
    window = _compat.window_of(function) if long else None
    chunks = _compat.chunks_of(function) if long else None
    plain = window is None and chunks is None
    if plain and not _compat.is_causal_mask(function):
        if long:
            info_once("packed or overlaid layers keep their own dense attention")
        return _compat.written_mask(**given)
    if isinstance(q_offset, Tensor) and not long:
        return _compat.written_mask(**given)
    seen = int(q_offset) + q_length - kv_offset
    keep = _padding(given.get("attention_mask"), kv_offset, seen)
    if keep is None and kv_length == seen and plain:
        return None
    if not long and not (plain and keep is not None and _takes_padding(q_length, device)):
        return _compat.written_mask(**given)
    if keep is not None and has_holes(keep):
        if long:
            info_once("padding inside a prompt: the forward is dense; pad at one end for sparse")
        return _compat.written_mask(**given)
    batch = int(given["batch_size"])
    if window is not None:
        return windows.window_mask(keep, window, batch, seen, device)
    if chunks is not None:
        places = torch.arange(kv_offset, kv_offset + seen, device=device)
        return windows.chunk_mask(keep, *chunks, places)
    return torch.ones(batch, seen, dtype=torch.bool, device=device) if keep is None else keep


def _takes_padding(queries: int, device: torch.device | str | None) -> bool:
    """Whether dense attention has a kernel for padding at an end, and needs no mask written out."""
    return queries > TILE and _type(device) == "cuda"


def _padding(given: Tensor | None, begin: int, seen: int) -> Tensor | None:
    """Which of `seen` keys are real, [B, seen]; None where all are."""
    if given is None:
        return None
    if given.shape[1] < begin + seen:
        raise ValueError(
            f"attention_mask must cover the {begin + seen} tokens in the cache and after it, got "
            f"{given.shape[1]}; put the mask of the earlier tokens in front"
        )
    keep = given[:, : begin + seen].bool()
    return None if bool(keep.all()) else keep[:, begin:]


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
        UnsupportedError: attention that is not causal, or takes more than a mask.
    """
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise UnsupportedError(
            f"sparse prefill needs causal attention, and {type(module).__name__} is not; use "
            "attn_implementation='sdpa' for this model"
        )
    foreign = [name for name in FOREIGN if kwargs.get(name) is not None]
    if foreign:
        raise UnsupportedError(
            f"{type(module).__name__} hands {foreign[0]} to attention, which sparse prefill does "
            "not know; use attn_implementation='sdpa' for this model"
        )
    state = find(module.config)  # type: ignore[arg-type]
    state.called = True
    options = {
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "softcap": softcap or 0.0,
        "sinks": s_aux,
    }
    out = _attend(module, query, key, value, attention_mask, dropout, state, options, kwargs)
    return _token_major(out, query, state), None


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    state: State,
    options: dict[str, Any],
    more: dict[str, Any],
) -> Tensor:
    windowed, chunked = windows.is_window(mask), windows.is_chunks(mask)
    if mask is not None and mask.dim() == 4 and not (windowed or chunked):
        if state.sparse(query.shape[2], key.shape[2], query.device.type):
            info_once("a forward with a mask of four dimensions is dense; padding takes two")
        return dense_attention(query, key, value, mask=_boolean(mask), dropout=dropout, **options)
    if mask is not None:
        key, value = (x[:, :, : mask.shape[-1]] for x in (key, value))
    batch, heads, rows, dim = query.shape
    long = state.sparse(rows, key.shape[2], query.device.type, batch * heads, dim)
    if mask is not None and windowed:
        window = more.get("sliding_window") or int(mask.max())
        exact = bool(dropout) or _wants_gradient(module, query, key, value)
        keep = mask[:, 0, 0] > 0
        out = _window(query, key, value, keep, window, exact, dropout, state, options)
    elif mask is not None and chunked:
        out = windows.dense_chunks(query, key, value, mask[:, 0, 0], dropout=dropout, **options)
    elif long and _sparsely(
        module, (query, key, value), dropout, mask, more.get("position_ids"), state
    ):
        out = _prefill(module, query, key, value, mask, state, options)
    else:
        out = dense_attention(query, key, value, keep=mask, holes=False, dropout=dropout, **options)
    if long and state.on_layer is not None:
        state.on_layer(_layer_of(module))
    return out


def _window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor,
    window: int,
    exact: bool,
    dropout: float,
    state: State,
    options: dict[str, Any],
) -> Tensor:
    if window >= key.shape[2]:
        return dense_attention(
            query, key, value, keep=keep, holes=False, dropout=dropout, **options
        )
    if exact:
        return windows.dense_window(query, key, value, keep, window, dropout=dropout, **options)
    index = windows.window_index(query, keep, window)
    return _sparse(query, key, value, index, state, options)[0]


def _sparsely(
    module: nn.Module,
    tensors: tuple[Tensor, Tensor, Tensor],
    dropout: float,
    keep: Tensor | None,
    positions: Tensor | None,
    state: State,
) -> bool:
    if dropout or _wants_gradient(module, *tensors):
        warn_once(
            "dense attention: the model is in training mode, or gradients are on, and the sparse "
            "kernels have no backward; call model.eval(), and it under torch.no_grad()"
        )
        return False
    if keep is None and state.packed(positions):
        info_once("packed sequences (position_ids restart) are dense; pass them one by one")
        return False
    return True


def _wants_gradient(module: nn.Module, *tensors: Tensor) -> bool:
    """Whether a backward pass may come, as in training mode: checkpointed layers run without
    gradients first."""
    return module.training or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def _layer_of(module: nn.Module) -> int:
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise UnsupportedError(
            f"{type(module).__name__} does not say which layer it is, which sparse prefill goes "
            "by; use attn_implementation='sdpa' for this model"
        )
    return int(layer)  # type: ignore[arg-type]


def _prefill(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    state: State,
    options: dict[str, Any],
) -> Tensor:
    layer = _layer_of(module)
    first, stop = real_bounds(query.shape[0], key.shape[2], query.device, keep)
    context = Context(
        layout=Layout(first, stop, query.shape[2], key.shape[2]),
        layer=layer,
        heads=tuple(range(query.shape[1])),
        scale=options["scale"],
        softcap=options["softcap"],
        impl=state.impl,
        sinks=options["sinks"],
    )
    if state.observe is not None:
        state.observe(context, query, key, value)
    begin = state.mark(query.device)
    below = layer < state.starting_layer
    index = None if below else state.method.build_index(query, key, context)
    dense = index is None or _covers(index, state, layer)
    built = state.mark(query.device)
    mass = None
    rows, lse = state.recall_rows, None
    if index is None or dense:
        out = dense_attention(query, key, value, keep=keep, holes=False, **options)
    else:
        out, lse = _sparse(query, key, value, index, state, options, return_lse=rows > 0)
    end = state.mark(query.device)
    if index is not None and lse is not None:
        mass = kept(query, key, value, (out, lse), index, rows, **options)
    checked = state.mark(query.device)
    state.note(LayerRecord(layer, index, dense, begin, built, end, checked, mass))
    return out


def _covers(index: SparseIndex, state: State, layer: int) -> bool:
    most = state.method.keys_per_row(layer)
    if most is not None and most_share(most, index.kv_len) < state.dense_from:
        # the budgets say so: no need to wait for the device
        return False
    if state.dense_from > 1 or covered_share(index) < state.dense_from:
        return False
    info_once(
        f"an index that covers {state.dense_from:.0%} or more of the prompt is served densely, "
        "which is faster; smaller budgets or a longer prompt make it sparse"
    )
    return True


def _sparse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: SparseIndex,
    state: State,
    options: dict[str, Any],
    *,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    width = value.shape[-1]
    query, key, value = even_head_dims(query, key, value)
    options = options | {"impl": state.impl, "precision": state.precision}
    if return_lse and not index.samples:
        out, lse = sparse_attention(query, key, value, index, return_lse=True, **options)
        return out[..., :width], lse
    out, lse = sparse_attention(query, key, value, index, **options), None
    if return_lse:
        # kept mass is that of the index's own keys, without those which samples stand for
        own = replace(index, samples=0)
        _, lse = sparse_attention(query, key, value, own, return_lse=True, **options)
    return out[..., :width], lse


def _token_major(out: Tensor, query: Tensor, state: State) -> Tensor:
    """[B, L, H, D] contiguous; in the queries' own memory where nobody needs them any more."""
    turned, free = out.transpose(1, 2), query.transpose(1, 2)
    fits = turned.shape == free.shape and free.is_contiguous() and not turned.is_contiguous()
    if state.reuse and fits and not torch.is_grad_enabled():
        return free.copy_(turned)
    return turned.contiguous()


def _boolean(given: Tensor) -> Tensor:
    """A written mask as which keys are seen."""
    if given.dtype == torch.bool:
        return given
    seen = given == 0
    if not given.is_floating_point() or bool((~seen & (given > _HIDDEN)).any()):
        raise UnsupportedError(
            "an attention mask of four dimensions must be boolean, or 0 where a key is seen and "
            f"-inf where it is not, got {given.dtype} with other values; use "
            "attn_implementation='sdpa' for masks that add to scores"
        )
    return seen


def _type(device: torch.device | str | None) -> str:
    return torch.device("cpu" if device is None else device).type


_compat.register(NAME, attention, mask)
