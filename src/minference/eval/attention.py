"""A transformers model whose prompts are read with a method's index, for as long as a block lasts.

Serves what an evaluation needs and refuses the rest: one unpadded prompt at a time, read whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minference.errors import UnsupportedError
from minference.eval.density import Recorder
from minference.index import real_bounds
from minference.methods.base import Context, Method
from minference.ops.attention.api import sparse_attention
from minference.ops.build import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "minference_eval"
_current: ContextVar[Recorder] = ContextVar("minference_eval_method")


@contextmanager
def attending(model: PreTrainedModel, method: Method) -> Iterator[Recorder]:
    """Reads prompts with `method`; the model is as before when the block ends.

    Yields:
        What the method answered, by layer.

    Raises:
        UnsupportedError: within the block, a call that is no whole prompt of batch 1.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, _no_mask)
    recorder = Recorder.around(method)
    token = _current.set(recorder)
    before = model.config._attn_implementation or "sdpa"
    model.set_attn_implementation(_NAME)
    try:
        yield recorder
    finally:
        model.set_attn_implementation(before)
        _current.reset(token)


def _no_mask(batch_size: int, attention_mask: Tensor | None = None, **_: object) -> None:
    """Every prompt here is one unpadded run, so that causality is all there is to mask."""
    if batch_size != 1 or (attention_mask is not None and not bool(attention_mask.all())):
        raise UnsupportedError(
            f"evaluation reads one prompt without padding at a time, got a batch of {batch_size} "
            "or a mask with holes; call the model once a prompt"
        )


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,  # noqa: ANN401
) -> tuple[Tensor, None]:
    """Attention of a layer in transformers' form: [B, H, L, D] in, [B, L, H, D] out."""
    unserved = [name for name in ("softcap", "s_aux", "sliding_window") if options.get(name)]
    if unserved or query.shape[2] != key.shape[2]:
        raise UnsupportedError(
            f"evaluation serves full causal attention over whole prompts, got {query.shape[2]} "
            f"queries, {key.shape[2]} keys and {', '.join(unserved) or 'no options'}; use another "
            "model or read the prompt at once"
        )
    recorder = _current.get()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    first, stop = real_bounds(1, key.shape[2], query.device)
    index = None
    if key.shape[2] >= (recorder.min_seq_len or 0):
        layout = Layout(first, stop, query.shape[2], key.shape[2])
        heads = tuple(range(query.shape[1]))
        layer: int = module.layer_idx  # type: ignore[assignment]
        index = recorder.build_index(query, key, Context(layout, layer, heads, scale))
    if index is None:
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
    else:
        out = sparse_attention(query, key, value, index, scale=scale)
    return out.transpose(1, 2).contiguous(), None
