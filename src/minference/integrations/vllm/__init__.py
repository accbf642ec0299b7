"""vLLM: sparse prefill by a plugin, or for an engine that already runs.

`register` is the plugin; vLLM calls it in every process. Until options ask for it, nothing
changes: the stock attention runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minference.integrations.vllm.attach import Handle, attach_llm, stats

__all__ = ["Handle", "attach_llm", "register", "stats"]

_HERE = "minference.integrations.vllm"


def register() -> None:
    """Tells vLLM where the backends are, and checks MINFERENCE_CONFIG. Safe to call again.

    Raises:
        FileNotFoundError: MINFERENCE_CONFIG names no file.
        ValueError, TypeError: the file holds options that do not exist or bad values.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from minference.integrations.vllm.options import asked_options

    asked_options(None, custom_backend=False)
    if current_platform.is_cpu():
        # vLLM's CPU platform knows one backend; ours is that one until options ask for more
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{_HERE}.cpu.Backend")
    else:
        register_backend(AttentionBackendEnum.CUSTOM, f"{_HERE}.cuda.Backend")
    from minference.integrations.vllm.worker import extend_workers

    extend_workers()


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name in ("Handle", "attach_llm", "stats"):
        from minference.integrations.vllm import attach

        return getattr(attach, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
