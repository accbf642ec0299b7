"""What runs inside vLLM's workers when an engine that already runs is attached to.

Workers are called by method name with plain values, so nothing is pickled.
"""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.platforms import current_platform

from minference.errors import UnsupportedError
from minference.integrations.vllm.launch import build_runtime
from minference.integrations.vllm.layers import SparseLayer
from minference.integrations.vllm.options import Options
from minference.integrations.vllm.prefill import Runtime

_log = init_logger("vllm.minference")


class WorkerExtension:
    """Worker methods for collective_rpc; the plugin adds them to vLLM's worker class, and
    `worker_extension_cls` takes this class where plugins are switched off."""

    vllm_config: Any

    def minference_attach(self, options: dict[str, Any]) -> dict[str, Any]:
        """Gives every full-attention layer of this worker sparse prefill.

        Returns:
            The names of the layers that are served; or a problem in words, which the caller raises,
            its kind, and whether this worker was attached before and stays so.
        """
        attached = _is_attached(self.vllm_config)
        try:
            return {"served": attach_layers(self.vllm_config, Options.from_dict(options))}
        except (ValueError, TypeError, UnsupportedError) as error:
            kind = "ValueError" if isinstance(error, ValueError) else type(error).__name__
            return {"problem": str(error), "kind": kind, "attached": attached}

    def minference_detach(self) -> int:
        """Puts the stock implementations back; the number of layers that had another."""
        return detach_layers(self.vllm_config)

    def minference_stats(self) -> dict[str, Any]:
        """Totals of this worker since it was attached or started; empty where it is neither."""
        for layer in self.vllm_config.compilation_config.static_forward_context.values():
            runtime = getattr(getattr(layer, "impl", None), "runtime", None)
            if isinstance(runtime, Runtime):
                return runtime.recorder.summary()
        return {}


def attach_layers(config: Any, options: Options) -> list[str]:  # noqa: ANN401
    """Replaces the implementations of the layers that run the stock one; the names of those whose
    long rows will be served.

    Raises:
        ValueError: options that do not fit the model.
        UnsupportedError: an engine or a model that cannot be served.
    """
    stock, sparse = _classes()
    named = config.compilation_config.static_forward_context
    impls = [layer for layer in named.values() if hasattr(layer, "impl")]
    if _is_attached(config):
        raise UnsupportedError("this engine is already served by minference; detach it first")
    if any(isinstance(x.impl, SparseLayer) and x.impl.runtime is not None for x in impls):
        raise UnsupportedError(
            "this engine was built with the plugin; build it without minference's options to "
            "attach, or leave it to them"
        )
    if current_platform.is_cuda_alike() and not config.model_config.enforce_eager:
        raise UnsupportedError(
            "this engine has captured CUDA graphs, which keep the attention they were captured "
            "with; build it with LLM(..., enforce_eager=True), or use the plugin: "
            "LLM(..., attention_backend='CUSTOM')"
        )
    own = [layer for layer in impls if type(layer.impl) is stock]
    if not own:
        names = sorted({type(layer.impl).__name__ for layer in impls})
        raise UnsupportedError(
            f"minference serves {stock.__name__}, this engine runs {', '.join(names)}; choose "
            f"that attention backend when the engine is built"
        )
    runtime = build_runtime(config, options)
    made = {id(layer): sparse.from_stock(layer.impl, runtime) for layer in own}
    for layer in own:
        layer.minference_stock = layer.impl
        layer.impl = made[id(layer)]
    return [name for name, x in named.items() if id(x) in made and made[id(x)].serves(name)]


def _is_attached(config: Any) -> bool:  # noqa: ANN401
    layers = config.compilation_config.static_forward_context.values()
    return any(hasattr(layer, "minference_stock") for layer in layers)


def detach_layers(config: Any) -> int:  # noqa: ANN401
    """Undoes `attach_layers`."""
    count = 0
    for layer in config.compilation_config.static_forward_context.values():
        if hasattr(layer, "minference_stock"):
            layer.impl = layer.minference_stock
            del layer.minference_stock
            count += 1
    return count


def extend_workers() -> None:
    """Adds the methods to vLLM's worker class, as `worker_extension_cls` would."""
    from vllm.v1.worker.worker_base import WorkerBase

    for name in vars(WorkerExtension):
        if name.startswith("minference_") and not hasattr(WorkerBase, name):
            setattr(WorkerBase, name, getattr(WorkerExtension, name))


def _classes() -> tuple[type, type[SparseLayer]]:
    if current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

        from minference.integrations.vllm.cpu import SparseCPUImpl

        return CPUAttentionBackendImpl, SparseCPUImpl
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

    from minference.integrations.vllm.cuda import SparseFlashImpl

    return FlashAttentionImpl, SparseFlashImpl
