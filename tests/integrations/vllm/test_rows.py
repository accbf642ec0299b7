"""Splitting a batch: the rows that V1's scheduler makes of chunks, hits and decodes."""

from __future__ import annotations

import pytest

from minference.integrations.vllm.rows import Row, batch_rows, long_rows, other_rows


def test_rows_of_the_batches_that_chunked_prefill_makes() -> None:
    # prompts of 121, 6 and 601 tokens, 256 tokens a step: first and second step, then a prefix hit
    first = batch_rows([0, 121, 127, 256], [121, 6, 129])
    assert first == (Row(0, 0, 121, 121), Row(1, 121, 127, 6), Row(2, 127, 256, 129))
    second = batch_rows([0, 1, 2, 256], [122, 7, 383])
    assert long_rows(second, min_chunk=128, min_context=300) == (Row(2, 2, 256, 383),)
    assert other_rows(second, second[2:]) == second[:2]
    hit = batch_rows([0, 89], [601])
    assert hit[0].queries == 89
    assert long_rows(hit, min_chunk=128, min_context=0) == ()


def test_padding_of_a_captured_graph_is_dropped() -> None:
    assert batch_rows([0, 1, 1, 1], [5, 0, 0]) == (Row(0, 0, 1, 5),)


def test_lengths_past_the_requests_are_ignored() -> None:
    assert batch_rows([0, 2], [2, 9, 9]) == (Row(0, 0, 2, 2),)


def test_more_queries_than_keys_are_no_causal_decoder() -> None:
    with pytest.raises(ValueError, match="4 queries on 3 keys"):
        batch_rows([0, 4], [3])
