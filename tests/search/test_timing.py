"""Weights of work are recovered from times, and a machine can be timed."""

import torch

from minference.patterns import AShape, BlockSparse, VerticalSlash
from minference.search.cost import CostModel, Timings, Work
from minference.search.timing import LayerShape, fit_timings, fit_weights


def test_known_weights_are_found_again() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([1e-5, 2e-6, 3e-8, 5e-8, 0.0], dtype=torch.float64)
    counts = (torch.rand(20, 4, generator=generator) * 1000).double()
    works = [Work(*row) for row in counts.tolist()]
    seconds = (weights[0] + counts @ weights[1:]).tolist()
    found, errors = fit_weights(works, seconds)
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), weights, rtol=1e-6, atol=0)
    assert errors[-1] < 1e-6


def test_no_weight_is_negative() -> None:
    works = [Work(1, blocks, 0, 10 - blocks) for blocks in range(1, 10)]
    found, errors = fit_weights(works, [1e-3 * work.blocks for work in works])
    assert min(found) >= 0
    assert errors[-1] < 1e-6


def test_a_machine_is_timed() -> None:
    shape = LayerShape(heads=2, kv_heads=1, dim=16, dtype=torch.float32, device=torch.device("cpu"))
    timings = fit_timings(shape, (1024, 2048), calls=1)
    assert timings.measured == 26
    assert timings.heads == 2
    assert timings.dense > 0
    assert min(timings.tile, timings.block, timings.listed, timings.column) >= 0
    assert timings.index.keys() == {"a_shape", "vertical_slash", "block_sparse"}
    assert 0 <= timings.residual <= timings.worst
    layer = [AShape(64, 256), VerticalSlash(64, 256)] * 2 + [BlockSparse(4)]
    assert timings.layer_seconds(layer, 2048) > 0
    assert Timings.from_dict(timings.to_dict()) == timings
    if timings.block:
        assert CostModel(timings).speedup([layer], 4096) > 0
