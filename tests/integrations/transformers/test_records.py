"""What a prefill tells: density, time, recall, progress; and when it is served densely."""

from __future__ import annotations

import logging

import pytest
import torch

import minference
from minference.head_patterns import default_patterns
from minference.index import SparseIndex
from minference.integrations.transformers.coverage import covered_share
from minference.integrations.transformers.records import kept, mark, seconds
from minference.methods import AShape, Method, MInference, TriShape
from minference.ops.attention.api import sparse_attention
from minference.ops.build import dense_index
from minference.patterns import BlockSparse, VerticalSlash
from minference.testing import context_for, layout_of, random_qkv, tiny_model

IDS = torch.randint(3, 320, (1, 300), generator=torch.Generator().manual_seed(0))
NARROW = AShape(sink=4, local=64, min_seq_len=0)
METHODS = {
    "a_shape": AShape(sink=64, local=256),
    "tri_shape": TriShape(sink=64, local=256),
    "lines": MInference(patterns=default_patterns(1, 4, VerticalSlash(100, 400))),
    "blocks": MInference(patterns=default_patterns(1, 4, BlockSparse(10))),
    "all": MInference(patterns=default_patterns(1, 4, VerticalSlash(4096, 4096))),
}


def index_of(method: Method, queries: int, keys: int) -> SparseIndex:
    q, k, _ = random_qkv(4, 2, queries, keys)
    index = method.build_index(q, k, context_for(layout_of(q, k), 4))
    assert index is not None
    return index


@pytest.mark.parametrize("queries", [4096, 1000])
@pytest.mark.parametrize("name", METHODS)
def test_covered_share_is_near_the_density(name: str, queries: int) -> None:
    index = index_of(METHODS[name], queries, 4096)
    density = index.density()
    assert density - 0.01 <= covered_share(index) <= density + 0.05


def test_an_index_of_nearly_all_is_served_densely(caplog: pytest.LogCaptureFixture) -> None:
    minference.log.forget_messages()
    model, wide = tiny_model(), AShape(sink=4, local=300, min_seq_len=0)
    ids = torch.randint(3, 320, (1, 600))
    with torch.no_grad():
        before = model(ids).logits
        with (
            caplog.at_level(logging.INFO, "minference"),
            minference.attach(model, wide, record=True) as handle,
        ):
            torch.testing.assert_close(model(ids).logits, before, atol=1e-4, rtol=1e-4)
            rows = handle.records
            assert handle.indices == [(layer, None) for layer in range(4)]
        assert caplog.text.count("is served densely") == 1
        with minference.attach(model, wide, record=True, dense_from=2) as handle:
            model(ids)
            assert all(index is not None for _, index in handle.indices)
            sparse = handle.records
    assert [row["density"] for row in rows] == [1.0] * 4
    assert [row["index_density"] for row in rows] == [row["density"] for row in sparse]
    assert all(row["density"] < 1 for row in sparse)


def test_times_and_progress_by_layer() -> None:
    model, seen = tiny_model(), []
    options = {"dense_from": 2, "on_layer": seen.append, "record": True, "starting_layer": 1}
    with torch.no_grad(), minference.attach(model, NARROW, **options) as handle:
        cache = model(IDS).past_key_values
        model(IDS[:, :1], past_key_values=cache)
        assert seen == [0, 1, 2, 3]
        assert all(row["attention_seconds"] > 0 for row in handle.records)
        assert all(row["index_seconds"] >= 0 for row in handle.records)


def test_recall_is_that_of_the_sampled_rows() -> None:
    q, k, v = random_qkv(4, 2, 200, 333, batch=2)
    layout = layout_of(q, k, left_padding=(0, 150))
    index = AShape(sink=3, local=20).build_index(q, k, context_for(layout, 4))
    options = {"scale": 0.3, "softcap": 5.0, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}
    answer = sparse_attention(q, k, v, index, return_lse=True, **options)
    mass, error = kept(q, k, v, answer, index, 200, **options)
    every = dense_index(layout, 4)
    whole = sparse_attention(q, k, v, every, return_lse=True, **options)
    expected = (answer[1] - whole[1]).exp().nan_to_num(1.0)
    torch.testing.assert_close(mass, expected, atol=1e-4, rtol=1e-4)
    distance = (answer[0] - whole[0]).flatten(2).norm(dim=-1) / whole[0].flatten(2).norm(dim=-1)
    torch.testing.assert_close(error, distance, atol=1e-4, rtol=1e-4)
    assert mass.min() < 0.5


def test_recall_is_recorded_when_asked() -> None:
    model = tiny_model()
    with torch.no_grad(), minference.attach(model, NARROW, dense_from=2, recall_rows=9) as handle:
        model(IDS)
        for row in handle.records:
            assert 0 < row["recall_min"] <= row["recall"] <= 1
            assert row["output_error"] > 0


def test_heads_make_up_their_layer() -> None:
    model = tiny_model()
    with torch.no_grad(), minference.attach(model, NARROW, dense_from=2, recall_rows=9) as handle:
        model(IDS)
        rows, heads = handle.records, handle.head_records
    assert [(r["layer"], r["head"]) for r in heads] == [(i, h) for i in range(4) for h in range(4)]
    for row in rows:
        own = [r for r in heads if r["layer"] == row["layer"]]
        assert min(r["recall_min"] for r in own) == row["recall_min"]
        for name in ("density", "recall", "output_error"):
            assert sum(r[name] for r in own) / 4 == pytest.approx(row[name])


def test_heads_served_densely_are_not_told() -> None:
    model, wide = tiny_model(), AShape(sink=4, local=300, min_seq_len=0)
    with torch.no_grad(), minference.attach(model, wide, record=True) as handle:
        model(IDS)
        assert handle.head_records == []


def test_the_clock_counts_seconds() -> None:
    begin = mark(torch.device("cpu"))
    assert 0 <= seconds(begin, mark(torch.device("cpu"))) < 5


@pytest.mark.parametrize("name", ["recall_rows", "dense_from", "chunk_tokens"])
def test_negative_numbers_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
        minference.attach(tiny_model(), NARROW, **{name: -1})


@pytest.mark.parametrize("name", ["min_seq_len", "chunk_tokens", "starting_layer", "recall_rows"])
@pytest.mark.parametrize("value", ["16k", 0.5, True])
def test_counts_are_whole_numbers(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"{name} must be an int, got {value!r}"):
        minference.attach(tiny_model(), NARROW, **{name: value})
