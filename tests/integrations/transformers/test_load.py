"""Which names are looked up where, without a network."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from huggingface_hub import constants
from transformers import AutoConfig

from minference.integrations.transformers import load as loading
from minference.testing import tiny_model

NEEDLE = Path(__file__).resolve().parents[3] / "models" / "needle"


def unreachable(*_: object, **__: object) -> None:
    raise OSError("no route to host")


def forbidden(*_: object, **__: object) -> None:
    raise AssertionError("the network was asked")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Options with which transformers was asked for a configuration."""
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda name, **options: seen.append(options))
    monkeypatch.setattr(loading, "getproxies", dict)
    return seen


def test_a_cpu_gets_float32_and_a_gpu_what_the_model_has(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tiny_model("qwen3").to(torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(NEEDLE).save_pretrained(tmp_path)
    model, _ = loading.load(str(tmp_path), "cpu")
    assert model.dtype == torch.float32
    assert loading.default_dtype("cuda") == "auto"


def test_weights_that_were_cut_off_are_one_error(tmp_path: Path) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cannot be loaded: .*; give the folder of a model"):
        loading.load(str(tmp_path), "cpu")


@pytest.mark.parametrize(
    "name", ["./gone", "../gone", "/gone", "~/gone", "out/models/gone", "gone/", "out\\gone"]
)
def test_a_path_that_is_not_there_is_refused_at_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "create_connection", forbidden)
    for load in (loading.load, loading.load_config, loading.load_tokenizer):
        with pytest.raises(ValueError, match="there is no such folder; give the folder"):
            load(name)


def test_a_mistyped_name_is_one_sentence_where_there_is_no_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loading, "getproxies", dict)
    monkeypatch.setattr(socket, "create_connection", unreachable)
    for load in (loading.load, loading.load_config, loading.load_tokenizer):
        with pytest.raises(ValueError, match=r"^model 'models/nedle' cannot be loaded: .*") as told:
            load("models/nedle")
        assert "not cached, and the hub cannot be reached; give the folder" in str(told.value)


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-8B"])
def test_hub_ids_are_left_to_the_hub_or_to_its_cache(
    name: str, monkeypatch: pytest.MonkeyPatch, asked: list[dict[str, Any]]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        loading.load_config(name)
    monkeypatch.setattr(socket, "create_connection", unreachable)
    loading.load_config(name)
    assert asked == [{}, {"local_files_only": True}]


def test_offline_means_the_cache(
    monkeypatch: pytest.MonkeyPatch, asked: list[dict[str, Any]]
) -> None:
    monkeypatch.setattr(socket, "create_connection", forbidden)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    loading.load_config("Qwen/Qwen3-8B")
    assert asked == [{"local_files_only": True}]


def test_a_proxy_decides_for_itself(
    monkeypatch: pytest.MonkeyPatch, asked: list[dict[str, Any]]
) -> None:
    monkeypatch.setattr(socket, "create_connection", forbidden)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(loading, "getproxies", lambda: {"https": "http://proxy:3128"})
    monkeypatch.setattr(loading, "proxy_bypass", lambda host: False)
    loading.load_config("Qwen/Qwen3-8B")
    assert asked == [{}]


def test_folders_need_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(socket, "create_connection", forbidden)
    tiny_model("qwen3").save_pretrained(tmp_path)
    assert loading.load_config(str(tmp_path)).num_hidden_layers == 4
