"""The environment variables, the logger and the error helpers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from minference import env, log
from minference.errors import MissingDependencyError, UnsupportedError, require, unknown_name


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in env.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    log.forget_messages()
    yield
    log.forget_messages()


def test_there_are_five_variables() -> None:
    assert len(env.VARIABLES) == 5
    assert env.snapshot() == dict.fromkeys(env.VARIABLES)


def test_every_variable_is_documented() -> None:
    page = (Path(__file__).parents[1] / "docs" / "env.md").read_text()
    assert [name for name in env.VARIABLES if name not in page] == []


def test_defaults() -> None:
    assert env.impl() == "auto"
    assert env.log_level() == "warning"
    assert env.config_path() is None
    assert env.cache_dir() == Path.home() / ".cache" / "minference"
    assert env.disabled() is False


def test_values_are_read_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINFERENCE_IMPL", " Torch ")
    monkeypatch.setenv("MINFERENCE_CONFIG", "~/options.json")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert env.impl() == "torch"
    assert env.config_path() == Path.home() / "options.json"
    assert env.cache_dir() == Path("/cache/minference")
    monkeypatch.setenv("MINFERENCE_CACHE", "/elsewhere")
    assert env.cache_dir() == Path("/elsewhere")
    assert env.snapshot()["MINFERENCE_IMPL"] == " Torch "


@pytest.mark.parametrize(
    ("value", "expected"), [("1", True), ("YES", True), ("0", False), ("", False), ("off", False)]
)
def test_disabled(value: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINFERENCE_DISABLE", value)
    assert env.disabled() is expected


def test_values_outside_the_set_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINFERENCE_DISABLE", "maybe")
    with pytest.raises(ValueError, match="MINFERENCE_DISABLE must be one of 1, true"):
        env.disabled()
    monkeypatch.setenv("MINFERENCE_IMPL", "tritn")
    with pytest.raises(ValueError, match=r"MINFERENCE_IMPL 'tritn': did you mean 'triton'\?"):
        env.impl()
    monkeypatch.setenv("MINFERENCE_LOG", "loud")
    with pytest.raises(ValueError, match="valid names are critical, debug, error, info, warning"):
        env.log_level()


def test_a_message_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="minference"):
        for _ in range(3):
            log.info_once("impl is torch")
            log.warn_once("no table", name="minference.head_patterns")
        log.info_once("impl is triton")
    assert [record.getMessage() for record in caplog.records] == [
        "impl is torch",
        "no table",
        "impl is triton",
    ]
    assert caplog.records[1].name == "minference.head_patterns"


def test_loggers_sit_under_one_root() -> None:
    assert log.get_logger("minference.ops.api").name == "minference.ops.api"
    assert log.get_logger("plugin").name == "minference.plugin"


def test_unknown_name_lists_the_valid_ones() -> None:
    error = unknown_name("method", "flexprefil", ["xattention", "flexprefill"])
    assert str(error) == (
        "unknown method 'flexprefil': did you mean 'flexprefill'? "
        "valid names are flexprefill, xattention"
    )


def test_require_names_the_extra() -> None:
    assert require("json", "hf") is __import__("json")
    with pytest.raises(MissingDependencyError, match=r"pip install 'minference\[viz\]'") as caught:
        require("no_such_package_here", "viz")
    assert isinstance(caught.value, UnsupportedError)
    assert isinstance(caught.value, ImportError)
