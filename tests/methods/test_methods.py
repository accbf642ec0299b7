"""Every method keeps what a method must keep, and each does what its name says."""

import pytest
import torch

from minference import methods
from minference.head_patterns import HeadPatterns, default_patterns
from minference.methods import Method
from minference.ops.build import a_shape_index
from minference.patterns import AShape, BlockSparse, Dense, TriShape, VerticalSlash
from minference.testing import check_method, context_for, layout_of, random_qkv

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


@pytest.mark.parametrize("name", ALL)
def test_method_keeps_the_contract(name: str) -> None:
    check_method(ALL[name])


def index_of(method: Method, length: int = 1000, layer: int = 0):  # noqa: ANN201
    q, k, _ = random_qkv(4, 2, length)
    layout = layout_of(q, k)
    return method.build_index(q, k, context_for(layout, 4, layer=layer)), layout


def test_every_pattern_reaches_its_head() -> None:
    index, layout = index_of(methods.MInference(patterns=MIXED))
    mask = index.to_dense_mask()[0]
    assert torch.equal(mask[1], a_shape_index(layout, (10,), (100,)).to_dense_mask()[0, 0])
    assert int(mask[2, -1].sum()) <= 3 * 64
    assert bool(mask[3, -50:].sum(dim=-1).eq(torch.arange(951, 1001)).all())
    assert index.head_density()[0, 0] < 1


def test_layer_of_dense_heads_asks_for_dense_attention() -> None:
    index, _ = index_of(methods.MInference(patterns=MIXED), layer=1)
    assert index is None


def test_dense_heads_beside_sparse_ones_are_complete() -> None:
    index, _ = index_of(methods.MInference(patterns=MIXED), layer=2)
    assert index.head_density()[0].eq(1).tolist() == [False, True, False, True]


def test_budget_length_scales_budgets_down_only() -> None:
    patterns = default_patterns(1, 4)
    context_length = 1000
    scaled = methods.MInference(patterns=patterns, budget_length=10_000)
    plain = methods.MInference(patterns=patterns.scaled(0.1))
    shorter = methods.MInference(patterns=patterns, budget_length=10)
    assert index_of(scaled, context_length)[0].density() == index_of(plain)[0].density()
    assert index_of(shorter)[0].density() == 1.0


def test_lines_cover_more_than_the_budget() -> None:
    table = default_patterns(1, 4, VerticalSlash(30, 160))
    budget = index_of(methods.MInference(patterns=table), 4000)[0].density()
    lines = index_of(methods.MInference(patterns=table, selection="lines"), 4000)[0].density()
    assert budget < lines


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
