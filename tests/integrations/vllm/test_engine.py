"""The real client in this process: `attach_llm` on a running `vllm.LLM` beside stock attention."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from minference import methods
from minference.errors import UnsupportedError
from minference.eval.tasks import make_sample
from minference.head_patterns import default_patterns
from minference.patterns import Dense, VerticalSlash

if TYPE_CHECKING:
    from vllm import LLM

pytestmark = pytest.mark.vllm
EVERYTHING = methods.AShape(sink=64, local=1 << 20, min_seq_len=0)


@pytest.fixture(scope="module")
def llm(settings: dict[str, Any]) -> Iterator[LLM]:
    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM

    yield LLM(**settings, distributed_executor_backend="uni")
    patch.undo()


def greedy(llm: LLM, prompts: list[str], tokens: int = 12) -> list[tuple[list[int], int]]:
    """Greedy ids of each prompt, and how many of its tokens came from the prefix cache."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens)
    results = llm.generate(prompts, params, use_tqdm=False)
    return [(list(r.outputs[0].token_ids), r.num_cached_tokens) for r in results]


@pytest.fixture(scope="module")
def stock(llm: LLM, prompts: list[str]) -> list[list[int]]:
    return [ids for ids, _ in greedy(llm, prompts)]


def implementations(llm: LLM) -> set[str]:
    """Names of the attention implementations in use."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    return {type(layer.impl).__name__ for layer in layers}


def test_installing_the_plugin_changes_nothing(llm: LLM) -> None:
    assert implementations(llm) == {"CPUAttentionBackendImpl"}


@pytest.mark.parametrize(
    "method",
    [EVERYTHING, methods.MInference(patterns=default_patterns(6, 8, Dense()), min_seq_len=0)],
    ids=["all-keys", "dense-heads"],
)
def test_full_density_gives_the_stock_ids(
    llm: LLM, prompts: list[str], stock: list[list[int]], method: methods.Method
) -> None:
    from minference.integrations.vllm import attach_llm

    with attach_llm(llm, method, min_chunk=16) as handle:
        assert handle.layers == 6
        first, again = greedy(llm, prompts), greedy(llm, prompts)
        totals = handle.stats()[0]
    assert [ids for ids, _ in first] == stock
    assert [ids for ids, _ in again] == stock
    assert [cached for _, cached in again] == [len(p) // 128 * 128 for p in prompts]
    if method is EVERYTHING:
        # two or three chunks of each long prompt, and the tails behind the cached prefixes
        assert totals["chunks"] >= 8
        assert totals["density"] == 1.0
    else:
        assert totals["chunks"] == 0


def test_mixed_dense_and_sparse_heads_and_undo(
    llm: LLM, prompts: list[str], stock: list[list[int]]
) -> None:
    from minference.integrations.vllm import attach_llm

    handle = attach_llm(llm, "a_shape", sink=64, local=256, min_seq_len=1024, starting_layer=2)
    greedy(llm, prompts)
    totals = handle.stats()[0]
    assert implementations(llm) == {"SparseCPUImpl"}
    handle.detach()
    handle.detach()
    assert implementations(llm) == {"CPUAttentionBackendImpl"}
    assert 0.05 < totals["density"] < 0.6
    assert [ids for ids, _ in greedy(llm, prompts)] == stock


def test_the_users_call(llm: LLM, prompts: list[str], stock: list[list[int]]) -> None:
    pytest.importorskip("minference.integrations.transformers", reason="the facade is not there")
    from minference import MInference

    # the default budgets cover prompts of this length, so nothing may change
    patterns = default_patterns(6, 8)
    served = MInference("vllm", "needle", min_seq_len=1024, patterns=patterns)(llm)
    assert served is llm
    assert [ids for ids, _ in greedy(served, prompts)] == stock
    assert implementations(llm) == {"SparseCPUImpl"}
    assert served.minference.stats()[0]["density"] == 1.0
    served.minference.detach()
    assert implementations(llm) == {"CPUAttentionBackendImpl"}


def test_needles_at_16k(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    from minference.integrations.vllm import attach_llm

    sample = make_sample("single", 16_500, 5)
    method = methods.MInference(
        patterns=default_patterns(6, 8, VerticalSlash(256, 768)), min_seq_len=4096
    )
    with attach_llm(llm, method) as handle:
        ((ids, _),) = greedy(llm, [sample.text(0)], tokens=24)
        totals = handle.stats()[0]
    text = llm.get_tokenizer().decode(ids)
    assert sample.matches(0, text), text
    assert totals["tokens"] > 12_000
    assert totals["density"] < 0.5


def test_two_methods_do_not_share_an_engine(llm: LLM, prompts: list[str]) -> None:
    from minference.integrations.vllm import attach_llm

    with attach_llm(llm, EVERYTHING) as handle:
        with pytest.raises(UnsupportedError, match="detach it first"):
            attach_llm(llm, "a_shape")
        assert implementations(llm) == {"SparseCPUImpl"}
        greedy(llm, prompts, tokens=1)
        assert handle.stats()[0]["chunks"] > 0
    assert implementations(llm) == {"CPUAttentionBackendImpl"}


def test_grouped_serves_chunks(llm: LLM, prompts: list[str], stock: list[list[int]]) -> None:
    from minference.integrations.vllm import attach_llm

    with attach_llm(llm, methods.Grouped(mass=1.0, most=1 << 10, min_seq_len=0)) as handle:
        assert handle.layers == 6
        assert [ids for ids, _ in greedy(llm, prompts)] == stock
    with attach_llm(llm, "grouped", min_seq_len=2048) as handle:
        greedy(llm, prompts, tokens=1)
        assert 0 < handle.stats()[0]["density"] < 1


def test_a_running_request_keeps_its_attention(llm: LLM, prompts: list[str]) -> None:
    from vllm import SamplingParams

    from minference.integrations.vllm import attach_llm

    handle = attach_llm(llm, EVERYTHING, workspace_mib=1)
    llm.llm_engine.add_request("one", prompts[0], SamplingParams(temperature=0, max_tokens=64))
    for _ in range(3):
        llm.llm_engine.step()
    with pytest.raises(UnsupportedError, match="still runs requests"):
        handle.detach()
    assert implementations(llm) == {"SparseCPUImpl"}
    llm.llm_engine.abort_request(["one"])
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    handle.detach()
    assert implementations(llm) == {"CPUAttentionBackendImpl"}


@pytest.mark.parametrize(
    ("variables", "options", "message"),
    [
        ({"MINFERENCE_DISABLE": "maybe"}, {}, "MINFERENCE_DISABLE"),
        ({"MINFERENCE_IMPL": "bogus"}, {}, "bogus"),
        ({}, {"impl": "hopper"}, "impl='hopper' cannot run here"),
        ({}, {"starting_layer": 6}, "starting_layer must be below the model's 6 layers, got 6"),
        ({}, {"patterns": 3}, "option patterns must be a file, an id or a table, got 3"),
    ],
)
def test_what_would_stop_the_first_prompt_is_refused(
    llm: LLM,
    variables: dict[str, str],
    options: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from minference.integrations.vllm import attach_llm

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises((ValueError, UnsupportedError), match=message):
        attach_llm(llm, "minference", **options)
    assert implementations(llm) == {"CPUAttentionBackendImpl"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "minferenz"}, ("minference", "tri_shape")),
        ({"selektion": "lines"}, ("selection", "patterns", "min_chunk")),
        ({"patterns": "no/such-model"}, ("get_support_models",)),
        ({"patterns": "meta-llama/Llama-3.1-8B-Instruct"}, ("6 layers of 8 heads",)),
        ({"selection": "all"}, ("budget", "lines")),
    ],
    ids=["method", "option", "patterns", "shape", "value"],
)
def test_bad_options_are_refused(llm: LLM, options: dict[str, Any], words: tuple[str, ...]) -> None:
    from minference.integrations.vllm import attach_llm

    with pytest.raises(ValueError) as error:  # noqa: PT011
        attach_llm(llm, **options)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert implementations(llm) == {"CPUAttentionBackendImpl"}


def test_something_else_than_an_engine_is_refused() -> None:
    from minference.integrations.vllm import attach_llm

    with pytest.raises(TypeError, match=r"vllm\.LLM"):
        attach_llm(object())  # type: ignore[arg-type]


def test_a_bad_pattern_file_is_a_bad_option(llm: LLM, tmp_path: Path) -> None:
    from minference.integrations.vllm import attach_llm

    path = tmp_path / "patterns.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"patterns\.json"):
        attach_llm(llm, patterns=str(path))
    assert implementations(llm) == {"CPUAttentionBackendImpl"}
