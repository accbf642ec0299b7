"""Methods by name and options."""

import pytest

from minference.eval.method_spec import build_method, parse_length, parse_methods
from minference.methods import AShape, MInference
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


@pytest.mark.parametrize("text", ["", "dense,dense", "nonsense", "a_shape:local"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r"method"):
        parse_methods(text)


def test_an_unknown_option_lists_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"local, min_seq_len, sink"):
        build_method(parse_methods("a_shape:locl=3")[0], tiny_model("qwen3").config)


def test_lengths() -> None:
    assert [parse_length(text) for text in ("4096", "4k", "1M")] == [4096, 4096, 1 << 20]
    with pytest.raises(ValueError, match="number of tokens"):
        parse_length("4.5k")
