"""`attach`: sparse prefill for one model, as a handle and context manager with a complete undo."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from torch import nn

from minference.errors import UnsupportedError
from minference.head_patterns import HeadPatterns
from minference.integrations.transformers import _compat, state
from minference.integrations.transformers.attention import NAME
from minference.integrations.transformers.chunks import chunk_token_wise
from minference.integrations.transformers.coverage import DENSE_FROM
from minference.integrations.transformers.host_cache import (
    HostCache,
    check_kv,
    is_on_host,
    to_host,
)
from minference.integrations.transformers.memory import check_memory
from minference.log import warn_once
from minference.methods import MInference, get_method
from minference.methods.base import Method

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REMEDY = (
    "use the model's native transformers class (without trust_remote_code; for GLM-4 the '-hf' "
    "conversion, such as zai-org/glm-4-9b-chat-1m-hf)"
)


class Handle:
    """An attached model; leaving the context or `detach` puts everything back."""

    def __init__(
        self,
        model: PreTrainedModel,
        own: state.State,
        *,
        chunk_tokens: int | None = None,
        kv: str = "device",
    ) -> None:
        self._state = own
        self._model = model
        self._chunk_tokens, self._kv = chunk_tokens, kv
        self._config = model.config.get_text_config(decoder=True)
        self._before = _compat.implementation(self._config)
        if self._before == NAME:
            raise ValueError("the model is attached already; detach the other handle first")
        self._undo = [] if chunk_tokens is None else chunk_token_wise(model, chunk_tokens)
        state.put(self._config, own)
        _compat.set_implementation(self._config, NAME)
        self._check = model.register_forward_hook(self._after_forward)
        before = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self._undo.append(before.remove)

    @property
    def method(self) -> Method:
        """What builds the indices."""
        return self._state.method

    @property
    def records(self) -> list[dict[str, float]]:
        """The last prefill by layer, as `records.LayerRecord.to_dict` tells it.

        Counted when read, from what `record=True` keeps; layers with a window are not in it.
        """
        return [layer.to_dict() for layer in self._state.layers]

    @property
    def indices(self) -> list[tuple[int, Any]]:
        """(layer, index) of the last sparse prefill, index None for layers served densely."""
        layers = self._state.layers
        return [(layer.layer, None if layer.dense else layer.index) for layer in layers]

    def detach(self) -> None:
        """Puts the model back as it was. A second call does nothing."""
        if state.holds(self._config, self._state):
            state.drop(self._config)
            _compat.set_implementation(self._config, self._before)
        self._check.remove()
        for undo in reversed(self._undo):
            undo()
        self._undo = []
        if self._model.__dict__.get("minference") is self:
            del self._model.minference

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def _before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a prompt: the memory that it needs, and its cache on the host."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        if ids is None or ids.shape[1] == 1:
            return None
        batch, tokens = ids.shape[:2]
        if self._chunk_tokens is not None and kwargs.get("output_router_logits"):
            raise UnsupportedError(
                "router logits are not collected while experts run in chunks; use "
                "output_router_logits=False or chunk_tokens=None"
            )
        if self._state.sparse(tokens, tokens, ids.device.type) and _on_one_device(self._model):
            keep = kwargs.get("logits_to_keep", 0)
            options = {"chunk_tokens": self._chunk_tokens, "kv": self._kv}
            logits = (keep or tokens) if isinstance(keep, int) else keep.numel()
            check_memory(self._model, tokens, batch=batch, logits=logits, **options)
        if self._kv == "device":
            return None
        return args, kwargs | {"past_key_values": self._cache(kwargs)}

    def _cache(self, kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        cache = kwargs.get("past_key_values")
        fp8 = self._kv == "host_fp8"
        if cache is None:
            used = kwargs.get("use_cache")
            used = self._config.use_cache if used is None else used
            return HostCache(self._config, fp8=fp8) if used else None
        if not is_on_host(cache) and not cache.get_seq_length():
            to_host(cache, self._config, fp8=fp8)
        return cache

    def _after_forward(self, model: nn.Module, args: object, output: object) -> None:
        self._check.remove()
        if not self._state.called:
            self.detach()
            raise UnsupportedError(
                f"{type(model).__name__} never called the attention interface, so it was not "
                f"served; {REMEDY}"
            )


def attach(
    model: PreTrainedModel,
    method: Method | str | None = None,
    *,
    starting_layer: int = 0,
    min_seq_len: int | None = None,
    impl: str = "auto",
    record: bool = False,
    dense_from: float = DENSE_FROM,
    recall_rows: int = 0,
    on_layer: Callable[[int], None] | None = None,
    chunk_tokens: int | None = None,
    kv: str = "device",
) -> Handle:
    """Prefills long prompts of a transformers model sparsely; everything else stays dense.

    Args:
        model: a causal language model, loaded.
        method: a method, or the name of one; MInference with the published patterns of this
            architecture and shape, else the default ones, unless given.
        starting_layer: layers below it are dense.
        min_seq_len: shortest context to serve sparsely, in tokens; the method's unless given.
        impl: implementation of the operations, as in `sparse_attention`.
        record: keep density and times of the last prefill for `Handle.records`.
        dense_from: layers whose index covers at least that share of the causal area are computed by
            the dense kernel, which is then faster; above 1 for never.
        recall_rows: also record the attention mass that so many rows of each layer keep.
        on_layer: called with the layer's number after each attention of a long prefill.
        chunk_tokens: run norms, MLPs and rotary embeddings over that many tokens at a time, which
            bounds their memory; 8192 suits a GPU. What they give is the same.
        kv: where keys and values stay: "device", "host" (a layer's are on the device while it
            computes), or "host_fp8" (e4m3 there: decoding sees them to one part in 16).

    Raises:
        ValueError: patterns of another shape, a bad number, or a model that is attached already.
        UnsupportedError: here, a model without causal attention or outside the attention interface;
            when called, a prompt that cannot fit into memory.
    """
    check_kv(kv)
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
    numbers = {
        "starting_layer": starting_layer,
        "min_seq_len": min_seq_len or 0,
        "dense_from": dense_from,
        "recall_rows": recall_rows,
    }
    for name, value in numbers.items():
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    own = state.State(
        method=_method(model, method),
        starting_layer=starting_layer,
        min_seq_len=min_seq_len,
        impl=impl,
        record=record or recall_rows > 0,
        dense_from=dense_from,
        recall_rows=recall_rows,
        on_layer=on_layer,
        reuse=chunk_tokens is not None,
    )
    return Handle(model, own, chunk_tokens=chunk_tokens, kv=kv)


def _on_one_device(model: PreTrainedModel) -> bool:
    return len(set(getattr(model, "hf_device_map", {"": 0}).values())) == 1


def _method(model: PreTrainedModel, given: Method | str | None) -> Method:
    config = model.config.get_text_config(decoder=True)
    if isinstance(given, str):
        cls = get_method(given)
        fields = getattr(cls, "__dataclass_fields__", {})
        options: dict[str, Any] = {"patterns": fitting(config)} if "patterns" in fields else {}
        given = cls(**options)
    method = MInference(patterns=fitting(config)) if given is None else given
    patterns = getattr(method, "patterns", None)
    if isinstance(patterns, HeadPatterns):
        check_shape(patterns, config)
    return method


def check_shape(patterns: HeadPatterns, config: Any) -> None:  # noqa: ANN401
    """Raises ValueError unless the patterns fit the model of this config."""
    shape = (config.num_hidden_layers, config.num_attention_heads)
    if patterns.shape != shape:
        raise ValueError(
            f"patterns must have the model's {shape[0]} layers and {shape[1]} heads, got "
            f"{patterns.shape[0]} and {patterns.shape[1]}; search this model with "
            "`minference search`, or pass default_patterns(layers, heads)"
        )


def fitting(config: Any) -> HeadPatterns:  # noqa: ANN401
    """The published patterns of this architecture and shape, else the default with a warning."""
    patterns = state.patterns_for(config)
    if patterns.provenance.model is None:
        warn_once(
            f"no searched patterns for this {config.model_type} of {config.num_hidden_layers} "
            "layers: every head gets the default pattern; `minference search MODEL` finds better"
        )
    return patterns
