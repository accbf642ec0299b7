"""A cache that keeps keys and values on the host: a layer's are on the device while it computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from minference.errors import UnsupportedError, unknown_name
from minference.integrations.transformers.host_layer import HostLayer, WindowLayer
from minference.integrations.transformers.lane import Lane

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

KV = ("device", "host", "host_fp8")


class HostCache(DynamicCache):
    """Keys and values on the host, pinned and copied behind the compute where there is a GPU.

    Decoding brings a layer back while the layer before it computes. Full-attention layers move;
    sliding and recurrent ones stay, as they are small.

    Args:
        config: of the model.
        fp8: keep them as e4m3 with one scale a token and head, in half the memory. A prompt's own
            attention still sees the exact ones.
    """

    def __init__(self, config: PreTrainedConfig, *, fp8: bool = False) -> None:
        super().__init__(config=config)
        to_host(self, config, fp8=fp8)


def to_host(cache: Cache, config: PreTrainedConfig, *, fp8: bool = False) -> None:
    """Turns a dynamic cache that holds nothing yet into one on the host, in place.

    Raises:
        UnsupportedError: a cache of another kind, or one that transformers offloads itself.
    """
    if not isinstance(cache, DynamicCache) or cache.offloading:
        kind = "an offloaded one" if cache.offloading else f"a {type(cache).__name__}"
        raise UnsupportedError(
            f"keys and values on the host need a plain DynamicCache, got {kind}; leave "
            "cache_implementation and past_key_values to the model, or use kv='device'"
        )
    records_past = any(getattr(layer, "record_past", False) for layer in cache.layers)
    lanes: dict[torch.device, Lane] = {}
    layers: list[Any] = []
    for layer in DynamicCache(config=config).layers:
        if type(layer) is DynamicLayer:
            layers.append(HostLayer(lanes, fp8=fp8))
        elif type(layer) is DynamicSlidingWindowLayer:
            layers.append(WindowLayer(layer.sliding_window))
        else:
            layers.append(layer)
    own = [layer for layer in layers if isinstance(layer, HostLayer)]
    for layer, following in zip(own, own[1:] + own[:1], strict=True):
        layer.following = following if len(own) > 1 else None
        # after a whole prompt nobody knows how much comes next
        layer.last = layer is own[-1]
    cache.layers, cache.layer_class_to_replicate = layers, None
    if records_past:
        cache.activate_past_recording()


def is_on_host(cache: Cache) -> bool:
    """Whether `to_host` has been here."""
    return any(isinstance(layer, HostLayer) for layer in cache.layers)


def has_layers_to_move(cache: Cache) -> bool:
    """Whether keys and values of some layer are on the device that `to_host` would have moved."""
    return any(type(layer) is DynamicLayer for layer in cache.layers)


def check_kv(kv: str) -> None:
    """Raises ValueError unless `kv` is one of KV."""
    if kv not in KV:
        raise unknown_name("kv", kv, KV)
