"""The handle of an attached model: what it tells, and the undo."""

from __future__ import annotations

import inspect
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor, nn

from minference.errors import UnsupportedError
from minference.integrations.transformers import _compat, state
from minference.integrations.transformers.attention import NAME
from minference.integrations.transformers.chunks import chunk_token_wise
from minference.integrations.transformers.host_cache import (
    HostCache,
    has_layers_to_move,
    is_on_host,
    to_host,
)
from minference.integrations.transformers.memory import check_memory
from minference.integrations.undo import Detachable
from minference.methods.base import Method
from minference.model_config import token_limit

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

REMEDY = (
    "use the model's native transformers class (without trust_remote_code; for GLM-4 the '-hf' "
    "conversion, such as zai-org/glm-4-9b-chat-1m-hf)"
)


class Handle(Detachable):
    """An attached model; leaving the context or `detach` puts everything back."""

    def __init__(
        self,
        model: PreTrainedModel,
        own: state.State,
        *,
        chunk_tokens: int | None = None,
        fuse: bool = False,
        kv: str = "device",
    ) -> None:
        self._state = own
        self._model = model
        self._chunk_tokens, self._kv = chunk_tokens, kv
        self._config = model.config.get_text_config(decoder=True)
        self._before = _compat.implementation(self._config)
        if self._before == NAME:
            raise ValueError("the model is attached already; detach the other handle first")
        self._undo = []
        if chunk_tokens is not None:
            self._undo = chunk_token_wise(model, chunk_tokens, fuse=fuse)
        state.put(self._config, own)
        _compat.set_implementation(self._config, NAME)
        self._check = model.register_forward_hook(self._after_forward)
        before = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self._undo.append(before.remove)

    def __reduce__(self) -> NoReturn:
        """Copies of a model would share this handle's state, or lose it."""
        raise UnsupportedError(
            "an attached model cannot be copied or pickled as a whole; detach it first and attach "
            "the copy, or keep its state_dict() or save_pretrained()"
        )

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
    def head_records(self) -> list[dict[str, float]]:
        """The last prefill by layer and head, as `records.LayerRecord.heads` tells it.

        Layers that the dense kernel served are not in it.
        """
        return [row for layer in self._state.layers for row in layer.heads()]

    @property
    def indices(self) -> list[tuple[int, Any]]:
        """(layer, index) of the last sparse prefill, index None for layers served densely."""
        layers = self._state.layers
        return [(layer.layer, None if layer.dense else layer.index) for layer in layers]

    def detach(self) -> None:
        """Puts the model back as it was. A second call does nothing."""
        if state.holds(self._config, self._state):
            state.drop(self._config)
            if _compat.implementation(self._config) == NAME:
                _compat.set_implementation(self._config, self._before)
        self._check.remove()
        for undo in reversed(self._undo):
            undo()
        self._undo = []
        if self._model.__dict__.get("minference") is self:
            del self._model.minference

    def _before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a prompt, what it asks for and the memory that it needs; its cache on the host."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        if ids is None:
            return None
        if ids.shape[1] > 1:
            self._check_prompt(ids, kwargs)
        if self._kv == "device":
            return None
        given = dict(zip(_parameters(type(model)), args, strict=False)) | kwargs
        return (), given | {"past_key_values": self._cache(given)}

    def _check_prompt(self, ids: Tensor, kwargs: dict[str, Any]) -> None:
        batch, tokens = ids.shape[:2]
        limit = token_limit(self._config)
        if limit is not None and tokens > limit:
            raise ValueError(
                f"the prompt has {tokens} tokens and the model takes {limit}; cut it, or raise "
                "config.max_position_embeddings if the model was made for more"
            )
        if kwargs.get("output_attentions"):
            raise UnsupportedError(
                "sparse prefill never has all attention weights; use output_attentions=False, "
                "`minference viz attention` for a picture, or attn_implementation='eager'"
            )
        router = kwargs.get("output_router_logits")
        router = getattr(self._config, "output_router_logits", False) if router is None else router
        if self._chunk_tokens is not None and router:
            raise UnsupportedError(
                "router logits are not collected while experts run in chunks; use "
                "output_router_logits=False or chunk_tokens=None"
            )
        if self._state.sparse(tokens, tokens, ids.device.type) and _on_one_device(self._model):
            keep = kwargs.get("logits_to_keep", 0)
            options = {"chunk_tokens": self._chunk_tokens, "kv": self._kv}
            logits = (keep or tokens) if isinstance(keep, int) else keep.numel()
            logits = 0 if self._model.get_output_embeddings() is None else logits
            cached = _uses_cache(kwargs, self._config)
            check_memory(self._model, tokens, batch=batch, logits=logits, cached=cached, **options)

    def _cache(self, kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        cache = kwargs.get("past_key_values")
        fp8 = self._kv == "host_fp8"
        if cache is None:
            used = _uses_cache(kwargs, self._config)
            return HostCache(self._config, fp8=fp8) if used else None
        tokens = cache.get_seq_length()
        if tokens and has_layers_to_move(cache):
            raise UnsupportedError(
                f"kv={self._kv!r} needs a cache that was on the host from its first token, got one "
                f"with {tokens} on the device; start it under this handle, or attach with "
                "kv='device'"
            )
        if not tokens and not is_on_host(cache):
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


@cache
def _parameters(kind: type[nn.Module]) -> list[str]:
    """Names of what a model's forward takes, in order."""
    return list(inspect.signature(kind.forward).parameters)[1:]


def _uses_cache(kwargs: dict[str, Any], config: PreTrainedConfig) -> bool:
    used = kwargs.get("use_cache")
    return bool(getattr(config, "use_cache", True) if used is None else used)


def _on_one_device(model: PreTrainedModel) -> bool:
    return len(set(getattr(model, "hf_device_map", {"": 0}).values())) == 1
