"""The plugin's options: what is read, what is refused, and what reaches other processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minference import methods
from minference.errors import UnsupportedError
from minference.head_patterns import FILE_NAMES, HeadPatterns, default_patterns, get_support_models
from minference.integrations.vllm.options import Model, Options, asked_options, model_patterns
from minference.patterns import VerticalSlash

MODEL = Model(names=("some/model",), model_type="qwen3", layers=2, heads=4)


def test_nothing_asked_means_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINFERENCE_CONFIG", raising=False)
    assert asked_options({}, custom_backend=False) is None
    assert asked_options({"minference": False}, custom_backend=True) is None
    assert asked_options({"other": 1}, custom_backend=True) == Options()


def test_additional_config_wins_over_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "options.json"
    path.write_text(json.dumps({"minference": {"method": "a_shape", "sink": 64}}))
    monkeypatch.setenv("MINFERENCE_CONFIG", str(path))
    assert asked_options({}, custom_backend=False) == Options("a_shape", {"sink": 64})
    own = asked_options({"minference": {"method": "tri_shape"}}, custom_backend=False)
    assert own == Options("tri_shape")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"method": "minferance"}, ("minference", "a_shape", "tri_shape")),
        ({"min_chunks": 3}, ("min_chunk", "patterns", "min_seq_len", "starting_layer")),
        ({"method": "a_shape", "vertical": 3}, ("sink", "local", "a_shape")),
        ({"impl": "cuda"}, ("auto", "torch", "triton")),
        ({"min_chunk": 1}, ("min_chunk", ">= 2")),
        ({"starting_layer": True}, ("starting_layer",)),
    ],
)
def test_bad_options_name_the_valid_ones(data: dict[str, object], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        Options.from_dict(data)
    assert all(word in str(error.value) for word in words)


def test_options_must_be_an_object() -> None:
    with pytest.raises(TypeError, match="object"):
        Options.from_dict("minference")


def test_a_missing_or_broken_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MINFERENCE_CONFIG", str(tmp_path / "none.json"))
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        asked_options(None, custom_backend=False)
    (tmp_path / "none.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        asked_options(None, custom_backend=False)


@pytest.mark.parametrize(
    "method",
    [
        methods.AShape(sink=10, local=300, min_seq_len=5),
        methods.MInference(
            patterns=default_patterns(2, 4, VerticalSlash(30, 200)),
            selection="lines",
            budget_length=4096,
        ),
        methods.Static(patterns=default_patterns(2, 4)),
    ],
    ids=lambda method: method.name,
)
def test_a_method_survives_the_way_to_a_worker(method: methods.Method) -> None:
    sent = json.loads(json.dumps(Options.from_method(method, min_chunk=7).to_dict()))
    received = Options.from_dict(sent)
    assert received.min_chunk == 7
    assert received.build(MODEL) == method


def test_a_method_that_is_no_plain_data_is_refused() -> None:
    method = methods.AShape(sink=1)
    object.__setattr__(method, "local", object())
    with pytest.raises(UnsupportedError, match="cannot be sent"):
        Options.from_method(method)


def test_patterns_of_another_shape_are_refused() -> None:
    options = Options.from_dict({"patterns": default_patterns(3, 4).to_dict()})
    with pytest.raises(ValueError, match="2 layers of 4 heads"):
        options.build(MODEL)


@pytest.mark.parametrize("name", FILE_NAMES)
def test_patterns_come_from_the_served_model(tmp_path: Path, name: str) -> None:
    default_patterns(2, 4, VerticalSlash(7, 70)).save(tmp_path / name)
    by_folder = Model((str(tmp_path),), "qwen3", 2, 4)
    assert model_patterns(by_folder)[1][3] == VerticalSlash(7, 70)
    known = get_support_models()[0]
    found = model_patterns(Model(("elsewhere", known), "", 1, 1))
    assert found == HeadPatterns.from_pretrained(known)


def test_unknown_models_get_the_default_patterns() -> None:
    method = Options().build(MODEL)
    assert isinstance(method, methods.MInference)
    assert method.patterns == default_patterns(2, 4)
