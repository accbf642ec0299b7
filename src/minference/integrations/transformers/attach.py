"""`attach`: sparse prefill for one model, as a handle and context manager with an undo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from minference.errors import UnsupportedError
from minference.head_patterns import HeadPatterns
from minference.integrations.transformers import _compat, state
from minference.integrations.transformers.coverage import DENSE_FROM
from minference.integrations.transformers.handle import REMEDY, Handle
from minference.integrations.transformers.host_cache import check_kv
from minference.methods import default_method_name
from minference.methods.base import Context, Method
from minference.methods.spec import fitting_patterns, named_method
from minference.model_config import layers_and_heads
from minference.ops._dispatch import check_impl
from minference.ops.attention.fp8 import check_precision
from minference.ops.checks import check_count

_OWN_KEYS = ("deepseek_v4", "doge")
"""Models that add keys or masks of their own behind a layer's mask."""


def attach(
    model: PreTrainedModel,
    method: Method | str | None = None,
    *,
    starting_layer: int = 0,
    min_seq_len: int | None = None,
    impl: str = "auto",
    precision: str = "native",
    record: bool = False,
    dense_from: float = DENSE_FROM,
    recall_rows: int = 0,
    on_layer: Callable[[int], None] | None = None,
    observe: Callable[[Context, Tensor, Tensor, Tensor], None] | None = None,
    chunk_tokens: int | None = None,
    fuse: bool = False,
    kv: str = "device",
) -> Handle:
    """Prefills long prompts of a transformers model sparsely; everything else stays dense.

    Args:
        model: a causal language model, loaded.
        method: a method, or the name of one; unless given "grouped" on a GPU that runs Triton's
            kernels and else "minference". A name takes the published patterns of this architecture
            and shape, else the default ones, where its method has patterns.
        starting_layer: layers below it are dense.
        min_seq_len: shortest context to serve sparsely, in tokens; unless given the method's, and
            on a GPU only calls of enough work (docs/kernels.md).
        impl: implementation of the operations, as in `sparse_attention`.
        precision: "fp8" multiplies queries, keys and values of sparse and windowed layers in e4m3,
            as in `sparse_attention`: faster, with an error of a few per cent in each output; for
            GPUs of compute capability 8.9 and newer. Dense layers and decoding stay as they are.
        record: keep density and times of the last prefill for `Handle.records`.
        dense_from: layers whose index covers at least that share of the causal area are computed by
            the dense kernel, which is then faster; above 1 for never.
        recall_rows: also record the attention mass that so many rows of each layer keep, and their
            outputs' error.
        on_layer: called with the layer's number after each attention of a long prefill.
        observe: called with context, q [B, H, L, D], k and v of each layer of a long prefill,
            before its attention; for tools that measure.
        chunk_tokens: run norms, MLPs and rotary embeddings over that many tokens at a time, which
            bounds their memory; 8192 suits a GPU. What they give is the same.
        fuse: compile that work on whole chunks with torch.compile: seconds once, then less time for
            each long prompt. Needs `chunk_tokens` and a C++ compiler.
        kv: where keys and values stay: "device", "host" (a layer's are on the device while it
            computes), or "host_fp8" (e4m3 there: decoding sees them to one part in 16).

    Raises:
        ValueError: patterns of another shape, an unknown name, a bad number, `fuse` without
            `chunk_tokens`, or a model that is attached already.
        UnsupportedError: here, a model without causal attention or outside the attention interface;
            when called, a prompt that cannot fit into memory.
    """
    check_kv(kv)
    check_impl(impl)
    check_precision(precision)
    if fuse and chunk_tokens is None:
        raise ValueError(
            "fuse=True compiles work on chunks and there are none; give chunk_tokens=8192"
        )
    _check_served(model)
    counts = {
        "starting_layer": starting_layer,
        "min_seq_len": min_seq_len or 0,
        "recall_rows": recall_rows,
        "chunk_tokens": chunk_tokens or 0,
    }
    for name, value in counts.items():
        check_count(name, value)
    if dense_from < 0:
        raise ValueError(f"dense_from must be at least 0, got {dense_from}")
    own = state.State(
        method=_method(model, method, impl),
        starting_layer=starting_layer,
        min_seq_len=min_seq_len,
        impl=impl,
        precision=precision,
        record=record or recall_rows > 0,
        dense_from=dense_from,
        recall_rows=recall_rows,
        on_layer=on_layer,
        observe=observe,
        reuse=chunk_tokens is not None and _compat.asks_once(model),
    )
    return Handle(model, own, chunk_tokens=chunk_tokens, fuse=fuse, kv=kv)


def _check_served(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"attach expects a model of transformers, got {type(model).__name__}; load it by "
            "AutoModelForCausalLM.from_pretrained, and give a wrapper's inner model (_orig_mod of "
            "torch.compile, get_base_model() of PEFT)"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{type(model).__name__} is an encoder-decoder; sparse prefill serves decoder-only "
            "causal models"
        )
    if not _compat.reaches_interface(model):
        raise UnsupportedError(
            f"{type(model).__name__} does not look its attention up in transformers' "
            f"AttentionInterface; {REMEDY}"
        )
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "index_topk", None) or config.model_type in _OWN_KEYS:
        raise UnsupportedError(
            f"{type(model).__name__} chooses keys by an indexer, a mask or a cache of its own, "
            "which sparse prefill would take the mask from; serve it by attn_implementation='sdpa'"
        )


def _method(model: PreTrainedModel, given: Method | str | None, impl: str) -> Method:
    config = model.config.get_text_config(decoder=True)
    if given is None:
        given = default_method_name(model.device, model.dtype, impl)
    if isinstance(given, str):
        given = named_method(given, {}, lambda: fitting_patterns(config))
    if not isinstance(given, Method):
        raise TypeError(
            f"method must be a name or an instance of a method, got {given!r}; options belong to "
            "the instance, as XAttention(stride=16)"
        )
    patterns = getattr(given, "patterns", None)
    if isinstance(patterns, HeadPatterns):
        check_shape(patterns, config)
    return given


def check_shape(patterns: HeadPatterns, config: Any) -> None:  # noqa: ANN401
    """Raises ValueError unless the patterns fit the model of this config."""
    shape = layers_and_heads(config)
    if patterns.shape != shape:
        raise ValueError(
            f"patterns must have the model's {shape[0]} layers and {shape[1]} heads, got "
            f"{patterns.shape[0]} and {patterns.shape[1]}; search this model with "
            "`minference search`, or pass default_patterns(layers, heads)"
        )
