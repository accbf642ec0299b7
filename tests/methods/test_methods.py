"""Every method keeps what a method must keep, and each does what its name says."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from minference import methods
from minference.errors import UnsupportedError
from minference.head_patterns import HeadPatterns, default_patterns
from minference.methods import Method
from minference.ops.build import a_shape_index, tri_shape_index
from minference.patterns import AShape, BlockSparse, Dense, TriShape, VerticalSlash
from minference.testing import (
    check_method,
    context_for,
    layout_of,
    lines_mask,
    random_qkv,
)

MIXED = HeadPatterns(
    patterns=(
        (VerticalSlash(40, 60), AShape(10, 100), BlockSparse(3), TriShape(5, 80, 50)),
        (Dense(),) * 4,
        (VerticalSlash(40, 60), Dense(), VerticalSlash(35, 2), Dense()),
    )
)

ALL: dict[str, Method] = {
    "dense": methods.Dense(),
    "a_shape": methods.AShape(sink=10, local=64),
    "tri_shape": methods.TriShape(sink=10, local=64, last=30),
    "dilated1": methods.Dilated1(),
    "dilated2": methods.Dilated2(),
    "minference": methods.MInference(patterns=MIXED),
    "minference-lines": methods.MInference(patterns=MIXED, selection="lines"),
    "static": methods.Static(patterns=MIXED),
}
ELSEWHERE = {
    "flexprefill": "test_flexprefill.py",
    "grouped": "test_grouped.py",
    "xattention": "test_xattention.py",
}


@pytest.mark.parametrize("name", ALL)
def test_method_keeps_the_contract(name: str) -> None:
    check_method(ALL[name], layers=3)


def test_every_method_is_held_to_the_contract() -> None:
    assert set(methods._OWN) == {method.name for method in ALL.values()} | ELSEWHERE.keys()
    for file in ELSEWHERE.values():
        assert "check_method(" in Path(__file__).with_name(file).read_text()


def index_of(method: Method, length: int = 1000, layer: int = 0):  # noqa: ANN201
    q, k, _ = random_qkv(4, 2, length)
    layout = layout_of(q, k)
    return method.build_index(q, k, context_for(layout, 4, layer=layer)), layout


def test_every_pattern_reaches_its_head() -> None:
    index, layout = index_of(methods.MInference(patterns=MIXED))
    mask = index.to_dense_mask()[0]
    assert torch.equal(mask[1], a_shape_index(layout, (10,), (100,)).to_dense_mask()[0, 0])
    tri_shape = tri_shape_index(layout, (5,), (80,), (50,)).to_dense_mask()[0, 0]
    assert torch.equal(mask[3], tri_shape)
    assert bool(mask[3, -50:].sum(dim=-1).eq(torch.arange(951, 1001)).all())
    alone, _ = index_of(methods.MInference(patterns=default_patterns(1, 4, VerticalSlash(40, 60))))
    assert torch.equal(mask[0], alone.to_dense_mask()[0, 0])
    assert index.head_density()[0, 0] < 1


@pytest.mark.parametrize(("topk", "blocks"), [(3, 3), (2, 2), (1, 2)])
def test_a_block_sparse_head_keeps_its_budget_to_the_diagonal(topk: int, blocks: int) -> None:
    index, _ = index_of(methods.MInference(patterns=default_patterns(1, 4, BlockSparse(topk))))
    rows = torch.arange(1000)
    kept = (rows // 64).clamp(max=blocks - 1) * 64 + rows % 64 + 1
    assert torch.equal(index.to_dense_mask()[0].sum(dim=-1), kept.expand(4, -1))


def test_blocks_of_other_sizes_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"blocks of 64 keys, .* use BlockSparse\(20\)"):
        methods.MInference(patterns=default_patterns(1, 4, BlockSparse(10, 128)))


def test_a_method_has_a_name() -> None:
    class Nameless(Method):
        def build_index(self, q, k, context):  # noqa: ANN001, ANN202
            return None

    with pytest.raises(TypeError, match="Nameless has no name; set `name: ClassVar"):
        Nameless()


def test_layer_of_dense_heads_asks_for_dense_attention() -> None:
    index, _ = index_of(methods.MInference(patterns=MIXED), layer=1)
    assert index is None


def test_dense_heads_beside_sparse_ones_are_complete() -> None:
    index, _ = index_of(methods.MInference(patterns=MIXED), layer=2)
    assert index.head_density()[0].eq(1).tolist() == [False, True, False, True]


def test_budget_length_scales_budgets_down_only() -> None:
    def mask_of(slash: int, budget_length: int | None = None) -> torch.Tensor:
        patterns = default_patterns(1, 4, VerticalSlash(slash, slash))
        method = methods.MInference(patterns=patterns, budget_length=budget_length)
        return index_of(method)[0].to_dense_mask()

    scaled = mask_of(100)
    assert not torch.equal(scaled, mask_of(1000))
    assert torch.equal(mask_of(1000, budget_length=10_000), scaled)
    assert torch.equal(mask_of(100, budget_length=10), scaled)


def test_lines_cover_more_than_the_budget() -> None:
    table = default_patterns(1, 4, VerticalSlash(30, 160))
    budget = index_of(methods.MInference(patterns=table), 4000)[0].density()
    lines = index_of(methods.MInference(patterns=table, selection="lines"), 4000)[0].density()
    assert budget < lines


@pytest.mark.parametrize(
    ("method", "distances", "band"),
    [
        (methods.Dilated1(), range(0, 8192, 2), 8192),
        (methods.Dilated2(), [*range(2048), *range(2048, 6143, 2)], 6143),
    ],
    ids=["dilated1", "dilated2"],
)
def test_dilated_methods_compute_the_blocks_of_their_lines(
    method: Method, distances: Sequence[int], band: int
) -> None:
    q, k, _ = random_qkv(1, 1, 300, 9500, dim=1)
    index = method.build_index(q, k, context_for(layout_of(q, k), 1))
    mask = index.to_dense_mask()[0, 0]
    assert torch.equal(mask, lines_mask(torch.arange(1024), torch.tensor(distances), 300, 9500))
    distance = torch.arange(9200, 9500)[:, None] - torch.arange(9500)
    assert bool(mask[(distance >= 0) & (distance < band)].all())


def test_static_lines_come_from_the_first_prompt() -> None:
    method = methods.Static(patterns=default_patterns(1, 4, VerticalSlash(40, 40)))
    first, _ = index_of(method)
    q, k, _ = random_qkv(4, 2, 1000, seed=5)
    again = method.build_index(q, k, context_for(layout_of(q, k), 4))
    fresh = methods.Static(patterns=method.patterns).build_index(
        q, k, context_for(layout_of(q, k), 4)
    )
    assert torch.equal(again.to_dense_mask(), first.to_dense_mask())
    assert not torch.equal(fresh.to_dense_mask(), first.to_dense_mask())


def test_names_find_their_classes() -> None:
    assert methods.get_method("a_shape") is methods.AShape
    assert {method.name for method in ALL.values()} <= set(methods.method_names())
    with pytest.raises(ValueError, match="valid names are a_shape"):
        methods.get_method("a-shape")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: methods.AShape(sink=-1), "AShape.sink must be between 0"),
        (lambda: methods.AShape(local=0), "AShape.local must be between 1"),
        (lambda: methods.TriShape(last=-1), "TriShape.last must be between 0"),
        (lambda: methods.Dense(min_seq_len=-5), "min_seq_len must be None or at least 0"),
        (lambda: methods.MInference(patterns=MIXED, selection="all"), "unknown selection 'all'"),
        (lambda: methods.MInference(patterns=MIXED, budget_length=0), "budget_length must be"),
    ],
)
def test_bad_options_are_named(make, message: str) -> None:  # noqa: ANN001
    with pytest.raises(ValueError, match=message):
        make()


def test_the_default_is_grouped_where_triton_runs_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(methods, "why_not_triton", lambda device, dtype: None)
    assert methods.default_method_name(cuda, torch.bfloat16) == "grouped"
    assert methods.default_method_name(cuda, torch.bfloat16, "hopper") == "grouped"
    assert methods.default_method_name(cuda, torch.bfloat16, "torch") == "minference"
    assert methods.default_method_name(cpu, torch.float32) == "minference"
    monkeypatch.setenv("MINFERENCE_IMPL", "reference")
    assert methods.default_method_name(cuda, torch.bfloat16) == "minference"
    monkeypatch.delenv("MINFERENCE_IMPL")
    monkeypatch.setattr(methods, "why_not_triton", lambda device, dtype: "triton is not installed")
    assert methods.default_method_name(cuda, torch.bfloat16) == "minference"
