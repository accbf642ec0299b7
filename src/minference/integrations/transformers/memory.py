"""How much memory a prompt needs, before it starts."""

from __future__ import annotations

import gc
import importlib.util
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from minference.errors import UnsupportedError
from minference.integrations.transformers.host_layer import piece_tokens
from minference.model_config import layer_configs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes of a prefill.

    Attributes:
        weights: of the model, loaded already.
        cache: keys and values on the device: all layers, or two while the rest is on the host.
        activations: the widest moment of a layer.
        logits: of the tokens that are asked for.
        host: keys and values on the host.
    """

    weights: int
    cache: int
    activations: int
    logits: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """On the device, weights included."""
        return self.weights + self.cache + self.activations + self.logits

    @property
    def new(self) -> int:
        """On the device, without the weights."""
        return self.total - self.weights


def estimate_memory(
    model: PreTrainedModel,
    tokens: int,
    *,
    batch: int = 1,
    chunk_tokens: int | None = None,
    kv: str = "device",
    logits: int = 1,
    cached: bool = True,
) -> Memory:
    """Bytes that a prefill of `tokens` tokens a row takes.

    Layers with a window keep that many keys on the device, recurrent ones none; latent attention
    (MLA) is counted as transformers 5.17 keeps it, compressed.

    Args:
        model: the model, loaded.
        tokens: of each row.
        batch: rows.
        chunk_tokens: of the long-prompt mode.
        kv: where keys and values stay, as in `attach`.
        logits: tokens a row whose logits are asked for.
        cached: whether keys and values are kept.
    """
    config = model.config.get_text_config(decoder=True)
    size = model.dtype.itemsize
    device, host = _cache_bytes(config, tokens, batch, size, kv) if cached else (0, 0)
    widest = max(_widest(own, tokens, chunk_tokens, size) for own in layer_configs(config))
    return Memory(
        weights=sum(p.numel() * p.element_size() for p in model.parameters()),
        cache=device,
        activations=batch * widest,
        logits=batch * logits * config.vocab_size * size,
        host=host,
    )


def _cache_bytes(config: Any, tokens: int, batch: int, size: int, kv: str) -> tuple[int, int]:  # noqa: ANN401
    """Bytes of keys and values on the device, and on the host."""
    device, host, moved = 0, 0, [0]
    # layers that read another's keys have none of their own
    for own, layer in zip(layer_configs(config), DynamicCache(config=config).layers, strict=False):
        if not isinstance(layer, DynamicLayer):
            continue
        kept = min(tokens, getattr(layer, "sliding_window", None) or tokens)
        tensors = [(heads * batch, dim) for heads, dim in _kept(own)]
        layer_bytes = sum(rows * dim for rows, dim in tensors) * kept * size
        if kv == "device" or type(layer) is not DynamicLayer:
            device += layer_bytes
            continue
        moved.append(layer_bytes)
        for rows, dim in tensors:
            # e4m3 comes with one float32 a row
            parts = [dim * size] if kv == "host" else [dim, 4]
            host += _pinned(tokens, [rows * part for part in parts])
    return device + sum(sorted(moved)[-2:]), host


def _kept(config: Any) -> list[tuple[int, int]]:  # noqa: ANN401
    """Heads and elements of a head that a layer keeps of a token: of its keys, of its values."""
    if getattr(config, "kv_lora_rank", None):
        return [(1, config.kv_lora_rank), (1, config.qk_rope_head_dim)]
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = _head_dim(config)
    return [(kv_heads, dim), (kv_heads, getattr(config, "v_head_dim", None) or dim)]


def _head_dim(config: Any) -> int:  # noqa: ANN401
    """Elements of a query head."""
    for name in ("qk_head_dim", "head_dim"):
        if getattr(config, name, None):
            return getattr(config, name)
    return config.hidden_size // config.num_attention_heads


def _pinned(tokens: int, token_bytes: list[int]) -> int:
    """Host memory of so many tokens in pieces, each rounded up to a power of two."""
    step = piece_tokens(token_bytes[0])
    sizes = [step] * (tokens // step) + [tokens % step]
    return sum(1 << (n * part - 1).bit_length() for part in token_bytes for n in sizes if n)


def _widest(config: Any, tokens: int, chunk: int | None, size: int) -> int:  # noqa: ANN401
    hidden, width = config.hidden_size, config.num_attention_heads * _head_dim(config)
    some = tokens if chunk is None else min(tokens, chunk)
    inter = getattr(config, "intermediate_size", None) or 0
    inter = max(inter) if isinstance(inter, list | tuple) else inter
    turned = 3 * some * width + (tokens * width if chunk is None else 0)
    attention = tokens * (2 * hidden + 2 * width) + turned
    mlp = 3 * tokens * hidden + 3 * some * inter
    # norms compute in float32 beside their argument, its copy and the residual
    norm = 3 * tokens * hidden * size + 2 * some * hidden * 4
    return max(attention * size, mlp * size, norm)


def check_memory(model: PreTrainedModel, tokens: int, **options: Any) -> Memory:  # noqa: ANN401
    """The estimate, or an error where it exceeds what is free.

    Args:
        model: as `estimate_memory`.
        tokens: as `estimate_memory`.
        **options: as `estimate_memory`.

    Raises:
        UnsupportedError: the prompt cannot fit; the message says what would make it.
    """
    need = estimate_memory(model, tokens, **options)
    places = [(model.device.type, need.new, free_memory(model.device))]
    if need.host:
        places.append(("host", need.host, free_memory(torch.device("cpu"))))
    if model.device.type == "cpu":
        places = [("host", need.new + need.host, free_memory(model.device))]
    for place, wanted, free in places:
        if wanted > free and wanted > free_memory(_collected(model.device, place)):
            raise UnsupportedError(
                f"a prompt of {tokens} tokens needs about {wanted / GIB:.1f} GiB on the {place} "
                f"beside the weights and {free / GIB:.1f} are free (keys and values "
                f"{(need.cache if place != 'host' else need.host or need.cache) / GIB:.1f}, a "
                f"layer's work {need.activations / GIB:.1f}, logits {need.logits / GIB:.1f}); use "
                f"{_remedy(need, **options)}"
            )
    return need


def _collected(device: torch.device, place: str) -> torch.device:
    """The place, once it is rid of what only waits to be freed: a cache in a reference cycle, and
    on the host pinned memory that torch keeps."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if place != "host":
        return device
    if device.type == "cuda":
        _release_pinned()
    return torch.device("cpu")


def _release_pinned() -> None:
    public = getattr(torch.accelerator, "empty_host_cache", None)
    release = public or getattr(torch._C, "_host_emptyCache", None)
    if release is not None:
        release()


def _remedy(need: Memory, **options: Any) -> str:  # noqa: ANN401
    ways = []
    if 4 * need.logits > need.new:
        ways.append("logits_to_keep=1")
    if options.get("chunk_tokens") is None:
        ways.append("chunk_tokens=8192")
    kv = options.get("kv", "device")
    ways += {"device": ["kv='host'"], "host": ["kv='host_fp8'"], "host_fp8": []}[kv]
    return ", ".join([*ways, "or a shorter prompt"] if ways else ["a shorter prompt"])


def free_memory(device: torch.device) -> int:
    """Bytes that a process can still take, those that torch holds in reserve included.

    torch keeps pinned host memory after its tensors are gone, as it keeps the device's.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + reserve
    # accelerate brings psutil; without it nobody knows, and nothing is refused
    if importlib.util.find_spec("psutil") is None:
        return sys.maxsize
    available = importlib.import_module("psutil").virtual_memory().available
    return available + _pinned_reserve()


def _pinned_reserve() -> int:
    if not torch.cuda.is_initialized():
        return 0
    pinned = torch.cuda.host_memory_stats()
    # torch 2.11 never counts a block as inactive, not even one that it has given back
    return max(0, pinned["allocated_bytes.current"] - pinned["active_bytes.current"])
