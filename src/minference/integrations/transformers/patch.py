"""`MInference(attn_type, model_name)(model)`: the call of the published package, kept working."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minference import methods
from minference.errors import UnsupportedError, unknown_name
from minference.head_patterns import HeadPatterns, get_support_models
from minference.integrations.transformers.attach import attach, check_shape
from minference.log import warn_once
from minference.methods.base import Method
from minference.methods.spec import fitting_patterns, named_method, takes_patterns
from minference.model_config import layers_and_heads

_PLAIN = ("dense", "hf", "minference_with_dense")


def attn_types() -> list[str]:
    """The attention types of `MInference`: the methods that are there, "hf" and "vllm"."""
    return sorted({*methods.method_names(), *_PLAIN, "vllm"})


class MInference:
    """Patches a model so that its long prompts prefill sparsely.

    Args:
        attn_type: one of `attn_types()`; "vllm" takes a `vllm.LLM`, "hf" changes nothing.
        model_name: hub id whose published patterns to use; the model itself may be local.
        config_path: pattern file, which must fit the model.
        starting_layer: layers below it are dense; -1 for none.
        kv_cache_cpu: keep keys and values on the host, as kv="host" of `attach`.
        kv_type: "dense" alone; kvpress compresses caches and composes with this library.
        is_search: False alone; `minference search` searches.
        attn_kwargs: options of the method, such as {"sink": 128}.

    Raises:
        ValueError: a name that does not exist; the message lists those that do.
        UnsupportedError: what other tools do, and which.
    """

    def __init__(
        self,
        attn_type: str = "minference",
        model_name: str | None = None,
        config_path: str | None = None,
        starting_layer: int = -1,
        kv_cache_cpu: bool = False,
        kv_type: str = "dense",
        is_search: bool = False,
        attn_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        if attn_type not in attn_types():
            raise unknown_name("attention type", attn_type, attn_types())
        if kv_type not in ("", "dense"):
            raise UnsupportedError(
                f"kv_type={kv_type!r} compresses the cache, which kvpress does: wrap the call in "
                "one of its presses; kv_type='dense' leaves the cache whole"
            )
        if is_search:
            raise UnsupportedError("is_search=True is now a command: `minference search MODEL`")
        self.attn_type = attn_type
        self.model_name = model_name
        self.config_path = config_path
        self.starting_layer = max(0, starting_layer)
        self.kv_cache_cpu = kv_cache_cpu
        self.options = {**(attn_kwargs or {}), **kwargs}

    def __call__(self, model: Any) -> Any:  # noqa: ANN401
        """The same object, patched; `model.minference.detach()` undoes it."""
        return self.patch_model(model)

    def patch_model(self, model: Any) -> Any:  # noqa: ANN401
        """As calling it."""
        if self.attn_type == "vllm":
            return self._patch_vllm(model)
        if not hasattr(model, "config"):
            raise TypeError(
                f"MInference({self.attn_type!r}) expects a model of transformers, got "
                f"{type(model).__name__}; a vllm.LLM takes MInference('vllm', name), or attach_llm"
                f"(llm, {self.attn_type!r})"
            )
        plain = self.attn_type in _PLAIN
        if plain and not self.kv_cache_cpu:
            return model
        method: Method = methods.Dense()
        if not plain:
            config = model.config.get_text_config(decoder=True)
            method = named_method(self.attn_type, self.options, lambda: self._patterns(config))
        kv = "host" if self.kv_cache_cpu else "device"
        model.minference = attach(model, method, starting_layer=self.starting_layer, kv=kv)
        return model

    def _patterns(self, config: Any) -> HeadPatterns:  # noqa: ANN401
        if self.config_path is not None:
            patterns = HeadPatterns.from_file(self.config_path)
            check_shape(patterns, config)
            return patterns
        shape = layers_and_heads(config)
        if self.model_name in get_support_models():
            patterns = HeadPatterns.from_pretrained(str(self.model_name))
            if patterns.shape == shape:
                return patterns
            warn_once(
                f"the patterns of {self.model_name} are for {patterns.shape}, the model has "
                f"{shape} (layers, heads): default patterns serve; `minference search` finds better"
            )
        return fitting_patterns(config)

    def _patch_vllm(self, llm: Any) -> Any:  # noqa: ANN401
        from minference.integrations.vllm import attach_llm

        if self.kv_cache_cpu:
            raise UnsupportedError("kv_cache_cpu=True is for transformers; vLLM has cpu_offload_gb")
        settings = dict(self.options)
        method = settings.pop("method", "minference")
        # without a table of that name, the vLLM side looks up the served model's patterns
        known = self.model_name in get_support_models()
        source = self.config_path or (self.model_name if known else None)
        if source is not None and takes_patterns(methods.get_method(method)):
            settings.setdefault("patterns", source)
        llm.minference = attach_llm(llm, method, starting_layer=self.starting_layer, **settings)
        return llm
