"""The plugin: options through vLLM's additional config, in engine and worker processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.vllm
Program = Callable[..., tuple[int, Any, str]]
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def test_configured_engines_serve_and_isolate(
    program: Program, settings: dict[str, Any], prompts: list[str]
) -> None:
    script = """
    from minference import methods
    settings |= {"distributed_executor_backend": "uni"}
    options = {"method": "a_shape", "local": 1 << 20, "min_seq_len": 0, "min_chunk": 16}
    options["workspace_mib"] = 1  # one of the two KV heads at a time
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
    stock = """
    llm = LLM(**settings, distributed_executor_backend="uni")
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    kinds = sorted({type(layer.impl).__module__ for layer in layers})
    print("RESULT", json.dumps([kinds, ids(llm, prompts)]))
    """
    status, result, log = program(stock, {"settings": settings, "prompts": prompts}, **IN_PROCESS)
    assert status == 0, log[-3000:]
    assert result == [["vllm.v1.attention.backends.cpu_attn"], own]


def test_bad_options_stop_the_start(program: Program, settings: dict[str, Any]) -> None:
    script = 'LLM(**settings, additional_config={"minference": {"metod": "a_shape"}})'
    status, _, log = program(script, {"settings": settings}, **IN_PROCESS)
    assert status != 0
    assert "did you mean 'method'? valid names are" in log, log[-3000:]
    assert all(name in log for name in ("min_chunk", "patterns", "starting_layer"))


def test_quantised_pages_are_refused(program: Program, settings: dict[str, Any]) -> None:
    script = """
    LLM(**settings, kv_cache_dtype="fp8", additional_config={"minference": True})
    """
    status, _, log = program(script, {"settings": settings}, **IN_PROCESS)
    assert status != 0
    assert "minference cannot serve a quantised KV cache" in log, log[-3000:]


def test_two_workers_have_their_own_heads(
    program: Program, settings: dict[str, Any], prompts: list[str]
) -> None:
    script = """
    from minference import methods
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
    undone = ids(llm, prompts)
    print("RESULT", json.dumps([stock, full, hits, undone, served, halves]))
    """
    status, result, log = program(
        script, {"settings": settings, "prompts": prompts}, VLLM_CPU_OMP_THREADS_BIND="0|1"
    )
    assert status == 0, log[-3000:]
    stock, full, hits, undone, served, halves = result
    assert full == hits == undone == stock
    assert [worker["density"] for worker in served] == [1.0, 1.0]
    # heads 0-3 live on the first worker and are dense, heads 4-7 on the second and are not
    assert halves[0]["density"] == 1.0
    assert 0.05 < halves[1]["density"] < 0.5
