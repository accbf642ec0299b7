"""Methods by name and options."""

from pathlib import Path

import pytest

from minference.head_patterns import default_patterns
from minference.methods import AShape, MInference
from minference.methods.spec import build_method, parse_method, parse_methods
from minference.patterns import VerticalSlash
from minference.testing import tiny_model


def test_commas_separate_methods_and_their_options() -> None:
    specs = parse_methods("dense,minference:vertical=100,slash=800,a_shape:local=64")
    assert [spec.label for spec in specs] == [
        "dense",
        "minference:vertical=100,slash=800",
        "a_shape:local=64",
    ]


def test_build_applies_options() -> None:
    config = tiny_model("qwen3").config
    a_shape, minference = (
        build_method(spec, config)
        for spec in parse_methods("a_shape:sink=64,local=1k,minference:vertical=100,slash=800")
    )
    assert a_shape == AShape(sink=64, local=1024)
    assert isinstance(minference, MInference)
    assert set(minference.patterns.counts()) == {VerticalSlash(100, 800)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grouped:mass=abc", "mass must be a finite number, got 'abc'"),
        ("grouped:most=1.5", "most must be a whole number, got 1.5"),
        ("grouped:samples=true", "samples must be a whole number, got True"),
        ("grouped:early_dense=3", "early_dense must be True or False, got 3"),
        ("flexprefill:tau=nan", "tau must be a finite number, got nan"),
        ("xattention:stride=8.0", "stride must be a whole number, got 8.0"),
        ("minference:budget_length=a", "budget_length must be a whole number, got 'a'"),
        ("dilated1:min_seq_len=inf", "min_seq_len must be a whole number, got inf"),
    ],
)
def test_an_option_that_is_no_such_number_is_refused(text: str, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        build_method(parse_method(text), tiny_model("llama").config)


def test_an_option_is_given_once() -> None:
    with pytest.raises(ValueError, match="option 'mass' of method 'grouped' must be given once"):
        parse_method("grouped:mass=.9,mass=.5")


@pytest.mark.parametrize("text", ["", "dense,dense", "nonsense", "a_shape:local"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r"method"):
        parse_methods(text)


def test_an_unknown_option_lists_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"local, min_seq_len, sink"):
        build_method(parse_methods("a_shape:locl=3")[0], tiny_model("qwen3").config)


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("minference", 131_072),
        ("minference:budget_length=none", None),
        ("minference:budget_length=32k", 32_768),
        ("minference:vertical=100", None),
        ("minference:vertical=100,budget_length=32k", 32_768),
    ],
)
def test_budgets_shrink_with_the_context_unless_given(text: str, length: int | None) -> None:
    method = build_method(parse_method(text), tiny_model("qwen3").config)
    assert isinstance(method, MInference)
    assert method.budget_length == length


@pytest.mark.parametrize("text", ["minference:vertical=many", "minference:vertical=2,patterns=x"])
def test_bad_budgets_are_refused(text: str, tmp_path: Path) -> None:
    table = tmp_path / "x.json"
    default_patterns(4, 4).save(table)
    spec = parse_method(text.replace("patterns=x", f"patterns={table}"))
    with pytest.raises(ValueError, match=r"number of tokens|both patterns"):
        build_method(spec, tiny_model("qwen3").config)
