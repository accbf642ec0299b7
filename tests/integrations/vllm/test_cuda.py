"""The CUDA backend with the classes of vLLM, without a GPU: torch plays the parent kernel."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from minference import methods
from minference.errors import UnsupportedError
from minference.integrations.vllm.metrics import Recorder
from minference.integrations.vllm.options import Options
from minference.integrations.vllm.prefill import Runtime

pytestmark = pytest.mark.vllm

PAGE, HEADS, KV_HEADS, DIM, PAGES = 16, 4, 2, 32, 64
CASCADE = ("cu_prefix_query_lens", "prefix_kv_lens", "suffix_kv_lens")
# (queries, context): a decode, a chunk, a short prompt, a whole prompt, a decode
BATCH = ((1, 300), (150, 350), (20, 20), (130, 130), (1, 7))


class Case:
    """A batch in pages, its metadata as vLLM's builders make it, and the dense answer."""

    def __init__(self) -> None:
        from vllm.v1.attention.backend import CommonAttentionMetadata
        from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata

        starts = [0]
        for queries, _ in BATCH:
            starts.append(starts[-1] + queries)
        lengths = [context for _, context in BATCH]
        pages = torch.randperm(PAGES - 1) + 1
        table = torch.zeros(len(BATCH), 32, dtype=torch.int32)
        for number, length in enumerate(lengths):
            count = -(-length // PAGE)
            table[number, :count] = pages[:count]
            pages = pages[count:]
        self.cache = torch.randn(PAGES, KV_HEADS, PAGE, 2 * DIM)
        self.query = torch.randn(starts[-1] + 3, HEADS, DIM)
        # fields of cascade attention, which vLLM 0.26 has and 0.32 has not
        names = {field.name for field in dataclasses.fields(FlashAttentionMetadata)}
        older = dict.fromkeys(names & set(CASCADE)) | (
            {"use_cascade": False, "common_prefix_len": 0} if "use_cascade" in names else {}
        )
        self.metadata = FlashAttentionMetadata(
            **older,
            num_actual_tokens=starts[-1],
            max_query_len=150,
            query_start_loc=torch.tensor(starts, dtype=torch.int32),
            max_seq_len=350,
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            block_table=table,
            slot_mapping=torch.zeros(starts[-1], dtype=torch.int64),
        )
        self.common = CommonAttentionMetadata(
            query_start_loc=self.metadata.query_start_loc,
            query_start_loc_cpu=self.metadata.query_start_loc,
            seq_lens=self.metadata.seq_lens,
            seq_lens_cpu_upper_bound=self.metadata.seq_lens,
            num_reqs=len(BATCH),
            num_actual_tokens=starts[-1],
            max_query_len=150,
            max_seq_len=350,
            block_table_tensor=table,
            slot_mapping=self.metadata.slot_mapping,
        )
        self.dense = torch.zeros_like(self.query)
        attend(self.query, self.cache, self.metadata, self.dense)


def attend(query: Tensor, cache: Tensor, metadata: Any, output: Tensor) -> None:
    """Dense attention over pages, as FlashAttention reads its arguments."""
    starts, lengths = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
    assert metadata.num_actual_tokens == starts[-1]
    assert metadata.max_query_len == max(b - a for a, b in itertools.pairwise(starts))
    assert metadata.max_seq_len >= max(lengths)
    for number, length in enumerate(lengths):
        own = metadata.block_table[number, : -(-length // PAGE)].long()
        both = cache[own].transpose(1, 2).flatten(0, 1)[:length]
        k, v = both.transpose(0, 1).repeat_interleave(HEADS // KV_HEADS, 0).split(DIM, dim=-1)
        a, z = starts[number], starts[number + 1]
        mask = torch.ones(z - a, length, dtype=torch.bool).tril(length - (z - a))
        out = torch.nn.functional.scaled_dot_product_attention(
            query[a:z].transpose(0, 1), k, v, attn_mask=mask
        )
        output[a:z] = out.transpose(0, 1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Batches that reach the parent's forward, which computes them densely."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

    from minference.integrations.vllm import layers

    seen: list[Any] = []

    def forward(*args: Any) -> Tensor:
        _, _, query, _, _, cache, metadata, output, *_ = args
        seen.append(metadata)
        if metadata is not None:
            attend(query, cache, metadata, output)
        return output

    step = SimpleNamespace(no_compile_layers={})
    monkeypatch.setattr(FlashAttentionImpl, "forward", forward)
    monkeypatch.setattr(layers, "get_forward_context", lambda: step)
    monkeypatch.setattr(layers, "get_tensor_model_parallel_rank", lambda: 0)
    return seen


def layer_with(calls: list[Any], method: methods.Method, **stock: Any) -> tuple[Any, Any]:
    """A layer whose implementation was replaced, and that implementation."""
    from vllm.v1.attention.backend import AttentionType

    from minference.integrations.vllm import layers
    from minference.integrations.vllm.cuda import SparseFlashImpl

    values = {
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_size": DIM,
        "scale": DIM**-0.5,
        "sliding_window": (-1, -1),
        "alibi_slopes": None,
        "logits_soft_cap": 0,
        "attn_type": AttentionType.DECODER,
        "sinks": None,
    }
    recorder = Recorder(lambda line: None, publish=False)
    runtime = Runtime(Options(min_chunk=64), method, 0, 0, False, recorder)
    impl = SparseFlashImpl.from_stock(SimpleNamespace(**values | stock), runtime)
    layer = SimpleNamespace(layer_name="model.layers.3.self_attn.attn", impl=impl)
    layers.get_forward_context().no_compile_layers[layer.layer_name] = layer
    return layer, impl


def builder() -> Any:  # what its constructor would take from a GPU's engine
    """A metadata builder without full graphs, ahead-of-time schedules or context parallelism."""
    from minference.integrations.vllm.cuda import Builder

    made = Builder.__new__(Builder)
    made.__dict__ |= {
        "aot_schedule": False,
        "aot_sliding_window": (-1, -1),
        "use_full_cuda_graph": False,
        "max_cudagraph_size": None,
        "max_num_splits": 0,
        "dcp_world_size": 1,
        "rswa_window": None,
        "mm_prefix_query_ranges_np": None,
        "cache_config": SimpleNamespace(cache_dtype="auto"),
        "kv_cache_dtype": torch.float32,
        "kv_cache_spec": SimpleNamespace(sliding_window=None),
    }
    return made


EVERYTHING = methods.AShape(sink=8, local=1 << 20)


@pytest.mark.parametrize("built", [True, False], ids=["plugin", "attached"])
def test_mixed_batches_are_split_and_put_together(calls: list[Any], built: bool) -> None:
    case = Case()
    if built:
        case.metadata = builder().build(0, case.common)
    layer, impl = layer_with(calls, EVERYTHING)
    output = torch.zeros_like(case.query)
    impl.forward(layer, case.query, None, None, case.cache, case.metadata, output)
    torch.testing.assert_close(output, case.dense, atol=2e-5, rtol=2e-5)
    assert [metadata.seq_lens.tolist() for metadata in calls] == [[300, 20, 7]]
    assert calls[0].query_start_loc.tolist() == [0, 1, 21, 22]
    assert impl.runtime.recorder.summary()["tokens"] == 280


def test_batches_without_long_rows_reach_the_parent_untouched(calls: list[Any]) -> None:
    case = Case()
    for method, stock in (
        (methods.Dense(), {}),
        (EVERYTHING, {"sliding_window": (127, 0)}),
    ):
        calls.clear()
        layer, impl = layer_with(calls, method, **stock)
        output = torch.zeros_like(case.query)
        impl.forward(layer, case.query, None, None, case.cache, case.metadata, output)
        assert len(calls) == 1
        assert calls[0] is case.metadata
        assert torch.equal(output, case.dense)


def test_the_profiling_run_and_other_masks_reach_the_parent(calls: list[Any]) -> None:
    case = Case()
    layer, impl = layer_with(calls, EVERYTHING)
    impl.forward(layer, case.query, None, None, case.cache, None, case.query)
    case.metadata.causal = False
    impl.forward(layer, case.query, None, None, case.cache, case.metadata, case.dense)
    assert calls == [None, case.metadata]


def test_every_quantised_cache_of_this_vllm_is_refused() -> None:
    from typing import get_args

    from vllm.config.cache import CacheDType

    from minference.integrations.vllm.launch import PLAIN_CACHES

    plain = {name for name in get_args(CacheDType) if name in PLAIN_CACHES}
    assert plain == {"auto", "float16", "bfloat16"}


def test_sinks_and_softcaps_are_served(calls: list[Any]) -> None:
    case, cap = Case(), 3.0
    sinks = torch.randn(HEADS)
    layer, impl = layer_with(calls, EVERYTHING, logits_soft_cap=cap, sinks=sinks)
    output = torch.zeros_like(case.query)
    impl.forward(layer, case.query, None, None, case.cache, case.metadata, output)
    length, row = 130, slice(171, 301)
    own = case.metadata.block_table[3, : -(-length // PAGE)].long()
    both = case.cache[own].transpose(1, 2).flatten(0, 1)[:length].transpose(0, 1)
    k, v = both.repeat_interleave(HEADS // KV_HEADS, 0).split(DIM, dim=-1)
    scores = case.query[row].transpose(0, 1) @ k.mT * DIM**-0.5
    scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf)
    with_sink = torch.cat([scores, sinks[:, None, None].expand(-1, length, 1)], dim=-1)
    expected = with_sink.softmax(dim=-1)[..., :-1] @ v
    torch.testing.assert_close(output[row], expected.transpose(0, 1), atol=2e-5, rtol=2e-5)


def test_layers_of_a_later_pipeline_stage_keep_their_numbers(calls: list[Any]) -> None:
    layer, impl = layer_with(calls, EVERYTHING)
    own = impl.prefill(layer)
    assert own.layer == 3
    # the last layer of this stage ends a step's log line, though the stage begins at layer 3
    assert impl.runtime.recorder.last_layer == 3


def test_drafts_of_speculative_decoding_stay_dense(calls: list[Any]) -> None:
    from minference.integrations.vllm.rows import Row

    layer, impl = layer_with(calls, EVERYTHING)
    own = impl.prefill(layer)
    assert own.candidates((Row(0, 0, 5, 9000), Row(1, 5, 13, 9000))) == ()


def test_alibi_is_refused(calls: list[Any]) -> None:
    layer, impl = layer_with(calls, EVERYTHING, alibi_slopes=torch.ones(HEADS))
    with pytest.raises(UnsupportedError, match="ALiBi"):
        impl.prefill(layer)


def test_a_gpu_gets_one_more_backend_and_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import platforms
    from vllm.v1.attention.backends import registry

    from minference.integrations.vllm import register

    seen: list[Any] = []
    monkeypatch.setattr(platforms, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    monkeypatch.setattr(registry, "register_backend", lambda *given: seen.append(given))
    register()
    custom = registry.AttentionBackendEnum.CUSTOM
    assert seen == [(custom, "minference.integrations.vllm.cuda.Backend")]


def test_mixed_batches_are_never_captured_and_prefixes_never_shared() -> None:
    from vllm.v1.attention.backend import AttentionCGSupport

    from minference.integrations.vllm.cuda import Backend

    builder = Backend.get_builder_cls()
    support = builder.get_cudagraph_support(None, None)  # type: ignore[arg-type]
    assert support == AttentionCGSupport.UNIFORM_BATCH
    assert builder.use_cascade_attention() is False
    assert Backend.get_name() == "CUSTOM"


@pytest.mark.parametrize(
    ("part", "name", "value", "words"),
    [
        ("cache_config", "cache_dtype", "fp8_e4m3", "quantised KV cache"),
        ("cache_config", "cache_dtype", "int4_per_token_head", "quantised KV cache"),
        ("cache_config", "cache_dtype", "ultraquant_4bit", "quantised KV cache"),
        ("cache_config", "cache_dtype", "float16", "float16 beside a model of bfloat16"),
        ("model_config", "use_mla", True, "MLA"),
        ("parallel_config", "decode_context_parallel_size", 2, "context parallelism"),
        ("parallel_config", "prefill_context_parallel_size", 2, "context parallelism"),
        ("parallel_config", "use_ubatching", True, "steps in parts"),
    ],
)
def test_engines_that_would_be_wrong_are_refused(
    part: str, name: str, value: object, words: str
) -> None:
    from minference.integrations.vllm.launch import refuse

    config = SimpleNamespace(
        cache_config=SimpleNamespace(cache_dtype="auto"),
        model_config=SimpleNamespace(use_mla=False, dtype=torch.bfloat16),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1
        ),
    )
    refuse(config)  # type: ignore[arg-type]
    setattr(getattr(config, part), name, value)
    with pytest.raises(UnsupportedError, match=words):
        refuse(config)  # type: ignore[arg-type]


def test_the_thresholds_are_those_of_all_hosts() -> None:
    from minference.integrations.vllm.launch import least
    from minference.methods.thresholds import CPU_TOKENS, min_seq_len, min_work

    assert least(EVERYTHING, "cpu") == (CPU_TOKENS, 0)
    for method in (EVERYTHING, methods.AShape(sink=8, local=64)):
        expected = min_seq_len(method, "cuda"), min_work(method, "cuda")
        assert least(method, "cuda") == expected
    assert least(methods.AShape(min_seq_len=5), "cuda") == (5, 0)
    assert least(methods.Dense(), "cuda")[0] > 1 << 40


def test_layers_that_draft_and_those_below_the_first_are_left_alone(calls: list[Any]) -> None:
    _, impl = layer_with(calls, EVERYTHING)
    options, recorder = Options(starting_layer=1), impl.runtime.recorder
    impl.runtime = Runtime(options, EVERYTHING, 0, 0, False, recorder, layers=3)
    served = [impl.serves(f"model.layers.{n}.self_attn.attn") for n in range(5)]
    assert served == [False, True, True, False, False]
    assert not impl.serves("draft_model.model.layers.1.self_attn.attn")
    impl.sliding_window = (127, 0)
    assert not impl.serves("model.layers.1.self_attn.attn")


def test_a_scheduler_is_known_by_name_class_and_base() -> None:
    from minference.integrations.vllm.launch import SCHEDULERS, _is_ours
    from minference.integrations.vllm.scheduler import IsolatingAsyncScheduler, IsolatingScheduler

    class Own(IsolatingScheduler):
        pass

    ours = (*SCHEDULERS.values(), IsolatingScheduler, IsolatingAsyncScheduler, Own)
    assert all(_is_ours(x) for x in ours)
    assert not any(_is_ours(x) for x in (None, "vllm.Scheduler", IsolatingScheduler.__mro__[2]))


def test_captured_graphs_cannot_be_attached_to(monkeypatch: pytest.MonkeyPatch) -> None:
    from minference.integrations.vllm import worker

    monkeypatch.setattr(worker, "current_platform", SimpleNamespace(
        is_cuda_alike=lambda: True, is_cpu=lambda: True
    ))  # fmt: skip
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context={}),
        model_config=SimpleNamespace(enforce_eager=False),
    )
    with pytest.raises(UnsupportedError, match=r"enforce_eager=True.*or use the plugin"):
        worker.attach_layers(config, Options())
