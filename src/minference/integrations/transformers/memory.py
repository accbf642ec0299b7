"""How much memory a prompt needs, before it starts."""

from __future__ import annotations

import gc
import importlib.util
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from minference.errors import UnsupportedError
from minference.integrations.transformers.host_layer import piece_tokens

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
) -> Memory:
    """Bytes that a prefill of `tokens` tokens a row takes.

    Args:
        model: the model, loaded.
        tokens: of each row.
        batch: rows.
        chunk_tokens: of the long-prompt mode.
        kv: where keys and values stay, as in `attach`.
        logits: tokens a row whose logits are asked for.
    """
    config = model.config.get_text_config(decoder=True)
    size = model.dtype.itemsize
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rows = kv_heads * batch
    layer = 2 * rows * dim * tokens
    layers = config.num_hidden_layers
    # e4m3 comes with one float32 a row
    parts = {"device": [], "host": [dim * size], "host_fp8": [dim, 4]}[kv]
    return Memory(
        weights=sum(p.numel() * p.element_size() for p in model.parameters()),
        cache=layer * size * (layers if kv == "device" else min(2, layers)),
        activations=batch * _widest(config, tokens, chunk_tokens, heads * dim, size),
        logits=batch * logits * config.vocab_size * size,
        host=2 * layers * _pinned(tokens, [rows * part for part in parts]),
    )


def _pinned(tokens: int, token_bytes: list[int]) -> int:
    """Host memory of so many tokens in pieces, each rounded up to a power of two."""
    if not token_bytes:
        return 0
    step = piece_tokens(token_bytes[0])
    sizes = [step] * (tokens // step) + [tokens % step]
    return sum(1 << (n * part - 1).bit_length() for part in token_bytes for n in sizes if n)


def _widest(config: Any, tokens: int, chunk: int | None, width: int, size: int) -> int:  # noqa: ANN401
    hidden = config.hidden_size
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
