"""Dense below the measured length; longer where budgets would buy most of the causal area."""

import pytest

from minference.head_patterns import HeadPatterns, default_patterns
from minference.methods import AShape, Grouped, MInference
from minference.methods.base import Context
from minference.methods.thresholds import (
    CPU_TOKENS,
    CUDA_TOKENS,
    min_seq_len,
    min_work,
    most_share,
    work,
)
from minference.testing import layout_of, random_qkv


def test_large_budgets_need_longer_prompts() -> None:
    method = MInference(patterns=default_patterns(2, 4))
    # 194 offsets of 64 keys and 1000 columns
    assert method.keys_per_row() == method.keys_per_row(1) == 194 * 64 + 1000
    assert 24_000 < min_seq_len(method, "cuda") < 24_576
    assert min_seq_len(method, "cpu") == CPU_TOKENS


@pytest.mark.parametrize("options", [{"selection": "lines"}, {"budget_length": 131072}])
def test_budgets_without_a_bound_keep_the_measured_length(options: dict) -> None:
    method = MInference(patterns=default_patterns(2, 4), **options)
    assert method.keys_per_row() is None
    assert min_seq_len(method, "cuda") == CUDA_TOKENS


def test_searched_tables_and_other_methods_start_at_the_measured_length() -> None:
    table = HeadPatterns.from_pretrained("gradientai/Llama-3-8B-Instruct-262k")
    assert min_seq_len(MInference(patterns=table), "cuda") == CUDA_TOKENS
    assert min_seq_len(AShape(), "cuda") == CUDA_TOKENS


def test_a_method_may_need_longer_prompts() -> None:
    assert min_seq_len(Grouped(), "cuda") == CUDA_TOKENS
    assert min_seq_len(Grouped(), "cpu") == Grouped.cpu_tokens > CPU_TOKENS
    assert min_seq_len(Grouped(min_seq_len=9), "cuda") == 9
    assert min_seq_len(Grouped(min_seq_len=9), "cpu") == 9


def test_the_method_decides_where_it_says_so() -> None:
    method = MInference(patterns=default_patterns(1, 1), min_seq_len=7)
    assert min_seq_len(method, "cuda") == min_seq_len(method, "cpu") == 7


@pytest.mark.parametrize(("queries", "context"), [(1, 7), (5, 5), (3, 9)])
def test_work_counts_the_pairs_of_every_head_and_dimension(queries: int, context: int) -> None:
    pairs = sum(context - queries + 1 + row for row in range(queries))
    assert work(queries, context, 3, 8) == 3 * 8 * pairs
    assert work(queries, context, 3, 256) == work(queries, context, 3, 128)


def test_calls_that_dense_attention_was_faster_at_have_too_little_work() -> None:
    least = min_work(Grouped(), "cuda")
    assert work(CUDA_TOKENS, CUDA_TOKENS, 32, 128) >= least
    # an eighth of the heads, as a worker of eight has them; a question behind 128K tokens
    assert work(CUDA_TOKENS, CUDA_TOKENS, 4, 128) < least
    assert work(512, 1 << 17, 32, 128) < least
    assert work(1 << 16, 1 << 16, 4, 128) >= least
    assert min_work(MInference(patterns=default_patterns(2, 4)), "cuda") == least // 2
    assert min_work(Grouped(), "cpu") == min_work(Grouped(min_seq_len=9), "cuda") == 0


@pytest.mark.parametrize("tokens", [300, 1000, 3000])
def test_no_index_covers_more_than_its_budgets_can_buy(tokens: int) -> None:
    method = MInference(patterns=default_patterns(1, 2).scaled(1 / 16))
    q, k, _ = random_qkv(2, 1, tokens)
    context = Context(layout_of(q, k), 0, (0, 1), scale=0.1)
    index = method.build_index(q, k, context)
    keys = method.keys_per_row(0)
    assert index is not None
    assert keys is not None
    assert index.density() <= most_share(keys, tokens) + 1e-9
