"""Counting what sparse prefill did, and its density."""

from __future__ import annotations

import pytest
import torch

from minference.index import real_bounds
from minference.integrations.vllm.density import sampled_density
from minference.integrations.vllm.metrics import Recorder
from minference.ops.build import Layout
from minference.testing import mixed_index


@pytest.mark.parametrize(("queries", "context"), [(300, 300), (200, 333), (1, 65), (500, 512)])
def test_density_of_every_tile_is_the_exact_one(queries: int, context: int) -> None:
    first, stop = real_bounds(1, context, "cpu")
    index = mixed_index(Layout(first, stop, queries, context), 5)
    assert sampled_density(index, tiles=100) == pytest.approx(index.density(), abs=1e-6)


def test_sampled_density_is_near_the_exact_one() -> None:
    first, stop = real_bounds(1, 4000, torch.device("cpu"))
    index = mixed_index(Layout(first, stop, 4000, 4000), 5)
    assert sampled_density(index) == pytest.approx(index.density(), abs=0.1)


def test_a_line_and_totals_for_each_chunk() -> None:
    lines: list[str] = []
    recorder = Recorder(lines.append, publish=False, last_layer=1)
    recorder.start_step()
    for layer, density in ((0, 0.2), (1, 0.4)):
        recorder.note(layer, 0, 100, 100, density)
        recorder.note(layer, 1, 50, 200, 1.0)
    assert lines == [
        "sparse prefill: 100 queries on 100 keys, density 0.3000 over 2 layers",
        "sparse prefill: 50 queries on 200 keys, density 1.0000 over 2 layers",
    ]
    first, second = sum(range(1, 101)), sum(range(151, 201))
    assert recorder.totals.causal_pairs == first + second
    assert recorder.totals.density == pytest.approx((0.3 * first + second) / (first + second))


def test_chunks_that_are_not_measured_are_counted() -> None:
    lines: list[str] = []
    recorder = Recorder(lines.append, publish=False)
    recorder.note(0, 0, 100, 100, 0.5)
    recorder.note(0, 0, 100, 900, None)
    totals = recorder.summary()
    assert (totals["chunks"], totals["tokens"], totals["density"]) == (2, 200, 0.5)
    assert len(lines) == 1


def test_a_chunk_whose_last_layer_turned_dense_is_counted_too() -> None:
    recorder = Recorder(lambda line: None, publish=False, last_layer=5)
    recorder.note(0, 0, 100, 100, 0.5)
    recorder.start_step()
    assert recorder.summary()["chunks"] == 1
