"""What a vLLM configuration asks for, checked when the engine starts, and the state it leads to."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import torch
from vllm import envs
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from minference import env
from minference.errors import UnsupportedError
from minference.integrations.vllm.metrics import Recorder
from minference.integrations.vllm.options import Model, Options, asked_options
from minference.integrations.vllm.prefill import Runtime
from minference.methods import Dense, Method
from minference.methods.thresholds import min_seq_len, min_work
from minference.ops._dispatch import resolve_impl

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SCHEDULERS = {
    False: "minference.integrations.vllm.scheduler.IsolatingScheduler",
    True: "minference.integrations.vllm.scheduler.IsolatingAsyncScheduler",
}
"""The scheduler that fails single requests, by whether scheduling is asynchronous."""

PLAIN_CACHES = ("auto", "float16", "bfloat16", "float32")
"""Cache types whose pages hold keys and values as they are; vLLM adds quantised ones by release."""

# vLLM shows its own loggers at INFO, on whatever handlers the server has
_log = init_logger("vllm.minference")


def options_of(config: VllmConfig) -> Options | None:
    """What the engine's configuration, or MINFERENCE_CONFIG, asks for."""
    custom = config.attention_config.backend == AttentionBackendEnum.CUSTOM
    return asked_options(config.additional_config, custom_backend=custom)


def start(config: VllmConfig) -> Runtime | None:
    """The state of this worker for the plugin; None where the stock backend was asked for.

    Layers of one engine share it: it is found again on the layers that already have it.

    Raises:
        ValueError: options that do not exist or do not fit the model.
        UnsupportedError: an engine that cannot be served.
    """
    options = options_of(config)
    if options is None:
        return None
    for layer in config.compilation_config.static_forward_context.values():
        runtime = getattr(getattr(layer, "impl", None), "runtime", None)
        if isinstance(runtime, Runtime):
            return runtime
    return build_runtime(config, options, may_choose_scheduler=True)


def build_runtime(
    config: VllmConfig, options: Options, *, may_choose_scheduler: bool = False
) -> Runtime:
    """Checks that the engine can be served and builds the method for its model.

    Args:
        config: the engine's configuration.
        options: what was asked.
        may_choose_scheduler: whether the scheduler is still to be made, in this very process.
    """
    refuse(config)
    _check_environment(config, options)
    model = model_of(config)
    method = options.build(model)
    if options.starting_layer >= model.layers:
        raise ValueError(
            f"starting_layer must be below the model's {model.layers} layers, got "
            f"{options.starting_layer}"
        )
    if may_choose_scheduler and _same_process(config):
        schedule = config.scheduler_config
        if schedule.scheduler_cls is None:
            schedule.scheduler_cls = SCHEDULERS[bool(schedule.async_scheduling)]
    isolate = _isolates(config, starting=may_choose_scheduler)
    context, work = least(method, config.device_config.device_type)
    longest = config.model_config.max_model_len
    if longest < context < sys.maxsize:
        _log.warning(
            "method %r serves contexts of %d tokens and more, this engine holds %d: every prompt "
            "stays dense unless min_seq_len is lower",
            method.name,
            context,
            longest,
        )
    _log.info(
        "sparse prefill by method %r for contexts of %d tokens and more%s",
        method.name,
        context,
        ", but for chunks of few heads or queries" if work else "",
    )
    rank = get_tensor_model_parallel_rank()
    report = _log.info if rank == 0 else _log.debug
    recorder = Recorder(report, publish=rank == 0)
    alone = config.parallel_config.world_size == 1
    return Runtime(options, method, context, work, isolate, recorder, model.layers, alone)


def refuse(config: VllmConfig) -> None:
    """Raises UnsupportedError for engines whose attention would be silently wrong."""
    cache = str(config.cache_config.cache_dtype)
    dtype = str(config.model_config.dtype).removeprefix("torch.")
    parallel = config.parallel_config
    problem = None
    if cache not in PLAIN_CACHES:
        problem = f"a quantised KV cache ({cache}); use kv_cache_dtype='auto'"
    elif cache not in ("auto", dtype):
        problem = f"a KV cache of {cache} beside a model of {dtype}; use kv_cache_dtype='auto'"
    elif config.model_config.use_mla:
        problem = "multi-head latent attention (MLA); serve this model without minference"
    elif max(parallel.decode_context_parallel_size, _prefill_ranks(parallel)) > 1:
        problem = "context parallelism; use tensor or pipeline parallelism"
    elif getattr(parallel, "use_ubatching", False):
        problem = "steps in parts (enable_dbo, ubatch_size); leave these options out"
    if problem:
        raise UnsupportedError(f"minference cannot serve {problem}")


def _check_environment(config: VllmConfig, options: Options) -> None:
    """Raises now what would otherwise stop the engine at its first long prompt."""
    env.disabled()
    device = torch.device(config.device_config.device_type)
    model = config.model_config
    resolve_impl(options.impl, device, model.dtype, model.get_head_size())


def _isolates(config: VllmConfig, *, starting: bool) -> bool:
    """Whether an error may be turned into NaN rows: the scheduler must be one of ours, and the
    model runner must count NaN logits."""
    scheduler = config.scheduler_config.scheduler_cls
    if not _is_ours(scheduler):
        if starting:
            _log.warning(
                "an error inside sparse attention will stop the engine; to fail only its request, "
                "add --scheduler-cls %s",
                SCHEDULERS[bool(config.scheduler_config.async_scheduling)],
            )
        return False
    if starting:
        # workers read it when they start; an engine that this process built before has kept it
        os.environ["VLLM_COMPUTE_NANS_IN_LOGITS"] = "1"
        getattr(envs, "disable_envs_cache", lambda: None)()
    if not envs.VLLM_COMPUTE_NANS_IN_LOGITS:
        _log.warning(
            "an error inside sparse attention will stop the engine, which counts no NaN logits; "
            "to fail only its request set VLLM_COMPUTE_NANS_IN_LOGITS=1 before it is built"
        )
        return False
    return True


def _is_ours(scheduler: str | type | None) -> bool:
    if not isinstance(scheduler, type):
        return scheduler in SCHEDULERS.values()
    names = (f"{base.__module__}.{base.__qualname__}" for base in scheduler.__mro__)
    return any(name in SCHEDULERS.values() for name in names)


def model_of(config: VllmConfig) -> Model:
    """What the options may depend on."""
    model = config.model_config
    served = model.served_model_name or []
    names = [model.model, *([served] if isinstance(served, str) else served)]
    text = model.hf_text_config
    return Model(
        names=tuple(dict.fromkeys(names)),
        model_type=getattr(text, "model_type", ""),
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
    )


def least(method: Method, device_type: str) -> tuple[int, int]:
    """`min_context` and `min_work` of a `Runtime`: what is less stays dense."""
    context = sys.maxsize if isinstance(method, Dense) else min_seq_len(method, device_type)
    return context, min_work(method, device_type)


def _prefill_ranks(parallel: object) -> int:
    # the option came after vLLM 0.24
    return getattr(parallel, "prefill_context_parallel_size", 1)


def _same_process(config: VllmConfig) -> bool:
    return config.parallel_config.distributed_executor_backend == "uni"
