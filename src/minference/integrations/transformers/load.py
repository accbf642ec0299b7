"""Load a model, its tokenizer or its configuration for a command: device and dtype chosen, errors
in one line, and no waiting for a hub that cannot be reached."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import torch

from minference.ops._dispatch import default_device

_SECONDS = 5.0


def default_dtype(device: str) -> torch.dtype | Literal["auto"]:
    """float32 on a CPU, since bfloat16 matrix products are slow on most; else the model's own."""
    return torch.float32 if device == "cpu" else "auto"


def load(name: str, device: str | None = None) -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        name: hub id or path.
        device: where to; the GPU where there is one, else the CPU, unless given.

    Raises:
        ValueError: there is no such model, or it cannot be read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    target = device or default_device().type
    with _source(name) as options:
        dtype = default_dtype(target)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    return model.to(target).eval(), tokenizer


def load_config(name: str) -> Any:  # noqa: ANN401
    """The configuration alone, for what can be refused before weights are read.

    Raises:
        ValueError: there is no such model, or it cannot be read.
    """
    from transformers import AutoConfig

    with _source(name) as options:
        return AutoConfig.from_pretrained(name, **options)


def load_tokenizer(name: str) -> Any:  # noqa: ANN401
    """The tokenizer alone.

    Raises:
        ValueError: there is no such model, or it cannot be read.
    """
    from transformers import AutoTokenizer

    with _source(name) as options:
        return AutoTokenizer.from_pretrained(name, **options)


@contextmanager
def _source(name: str) -> Iterator[dict[str, Any]]:
    """Options with which transformers finds a model; what it raises becomes one sentence."""
    from safetensors import SafetensorError

    remedy = "give the folder of a model, or a hub id that is cached or can be fetched"
    local = Path(name).is_dir()
    if not local and _is_path(name):
        raise ValueError(f"model {name!r} cannot be loaded: there is no such folder; {remedy}")
    reached = local or hub_answers()
    try:
        yield {} if reached else {"local_files_only": True}
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        if not reached:
            reason = "there is no such folder, it is not cached, and the hub cannot be reached"
        raise ValueError(f"model {name!r} cannot be loaded: {reason}; {remedy}") from error


def _is_path(name: str) -> bool:
    """Whether a name cannot be a hub id, which is `model` or `owner/model`."""
    return name[:1] in (".", "/", "~") or name[-1:] == "/" or name.count("/") > 1 or "\\" in name


def hub_answers() -> bool:
    """Whether a connection to the hub opens: its own client tries for more than a minute. Behind a
    proxy that is left to the client."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    hub, proxies = urlsplit(constants.ENDPOINT), getproxies()
    host = hub.hostname or ""
    if (hub.scheme in proxies or "all" in proxies) and not proxy_bypass(host):
        return True
    port = hub.port or (80 if hub.scheme == "http" else 443)
    try:
        socket.create_connection((host, port), timeout=_SECONDS).close()
    except OSError:
        return False
    return True
