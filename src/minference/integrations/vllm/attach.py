"""Sparse prefill for an engine that already runs: `attach_llm(llm, ...)`, with an undo.

The engine may live in this process, in an engine process, or in several workers: all are reached
by vLLM's own collective_rpc, with a method name and plain values.
"""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, Any

from minference.errors import UnsupportedError
from minference.head_patterns import HeadPatterns
from minference.integrations.undo import Detachable
from minference.integrations.vllm.options import Options
from minference.methods import Method

if TYPE_CHECKING:
    from vllm import LLM

_EXTENSION = "minference.integrations.vllm.worker.WorkerExtension"


class Handle(Detachable):
    """An attached engine; `detach` gives it back as it was. Also a context manager."""

    def __init__(self, llm: LLM, layers: int) -> None:
        """Made by `attach_llm`."""
        self.llm = llm
        self.layers = layers
        self._attached = True

    def detach(self) -> None:
        """Restores vLLM's own attention, and forgets cached prefixes. Twice is once.

        Raises:
            UnsupportedError: requests are running.
        """
        if self._attached:
            _forget_prefixes(self.llm)
            _call(self.llm, "minference_detach")
            self._attached = False

    def stats(self) -> list[dict[str, Any]]:
        """What each worker served: chunks, tokens, pairs, density, failures."""
        return stats(self.llm)


def attach_llm(
    llm: LLM,
    method: Method | str | None = None,
    *,
    min_chunk: int = 128,
    starting_layer: int = 0,
    workspace_mib: int = 512,
    impl: str = "auto",
    **settings: Any,  # noqa: ANN401
) -> Handle:
    """Serves the long prompts of a running `vllm.LLM` by a sparse method.

    Cached prefixes are forgotten, since the other attention computed them. An engine whose
    scheduler fails single requests does so only if VLLM_COMPUTE_NANS_IN_LOGITS was 1 when it was
    built; without it an error stops the engine.

    Args:
        llm: the engine, idle.
        method: a method or its name; "minference" with the model's own patterns unless given.
        min_chunk: chunks of fewer queries stay dense.
        starting_layer: layers below it stay dense.
        workspace_mib: most MiB of keys and values that are copied out of pages at a time; the
            context of one KV head at least.
        impl: implementation of the operations, as in `sparse_attention`.
        settings: options of a method that is given by name, such as `patterns`, a file or an id.

    Raises:
        TypeError: no `vllm.LLM`.
        ValueError: options that do not exist or do not fit the model.
        UnsupportedError: an engine that cannot be served or is not idle, and what to do.
    """
    call = getattr(llm, "collective_rpc", None)
    if inspect.iscoroutinefunction(call) or not (call and hasattr(llm, "reset_prefix_cache")):
        raise TypeError(
            f"attach_llm expects a vllm.LLM, got {type(llm).__name__}; for a server use the plugin "
            f"(vllm serve --additional-config), see docs/vllm.md"
        )
    common = {"min_chunk": min_chunk, "starting_layer": starting_layer, "impl": impl}
    common["workspace_mib"] = workspace_mib
    if isinstance(method, Method):
        if settings:
            raise ValueError(f"give {sorted(settings)} to the method itself, not beside it")
        options = Options.from_method(method, **common)
    else:
        settings = {name: _plain(value) for name, value in settings.items()}
        options = Options.from_dict({"method": method or "minference", **settings, **common})
    _forget_prefixes(llm)
    replies = _call(llm, "minference_attach", options.to_dict())
    problems = [reply for reply in replies if "problem" in reply]
    if problems:
        if not any(reply["attached"] for reply in problems):
            _call(llm, "minference_detach")
        kinds = {"ValueError": ValueError, "TypeError": TypeError}
        raise kinds.get(problems[0]["kind"], UnsupportedError)(problems[0]["problem"])
    served = {name for reply in replies for name in reply["served"]}
    if not served:
        _call(llm, "minference_detach")
        raise UnsupportedError(
            "no layer of this model would be served: each has a sliding window, belongs to a draft "
            f"or lies below starting_layer={starting_layer}"
        )
    return Handle(llm, len(served))


def stats(llm: LLM) -> list[dict[str, Any]]:
    """What each worker of an engine served sparsely, attached or started with the plugin."""
    return _call(llm, "minference_stats")


def _forget_prefixes(llm: LLM) -> None:
    # older releases say nothing
    if llm.reset_prefix_cache() is False:
        raise UnsupportedError(
            "this engine still runs requests, whose cached prefixes another attention would go on "
            "with; let them finish, or abort them, first"
        )


def _plain(value: object) -> object:
    """An option as it may travel to a worker."""
    if isinstance(value, HeadPatterns):
        return value.to_dict()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _call(llm: LLM, name: str, *args: Any) -> list[Any]:  # noqa: ANN401
    try:
        return llm.collective_rpc(name, args=args)
    except Exception as error:
        if name not in str(error) and "not implemented" not in str(error):
            raise
        raise UnsupportedError(
            f"vLLM's workers have no method {name!r}: they run without this library's plugin. "
            f"Install minference where they run, leave VLLM_PLUGINS unset or add 'minference' to "
            f"it, or build the engine with worker_extension_cls={_EXTENSION!r}"
        ) from error
