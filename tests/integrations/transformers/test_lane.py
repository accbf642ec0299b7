"""The lane's thread on a CPU, with streams and events that only take notes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache

from minference.integrations.transformers import HostCache, host_layer, lane
from minference.integrations.transformers.lane import Lane
from minference.testing import tiny_model

NOTES: list[str] = []


class Stream:
    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device

    def wait_event(self, event: object) -> None:
        NOTES.append("wait")

    def wait_stream(self, stream: object) -> None:
        NOTES.append("wait")

    def synchronize(self) -> None:
        NOTES.append("drained")


class Event:
    def record(self, stream: object) -> None:
        NOTES.append("record")

    def synchronize(self) -> None:
        NOTES.append("synchronize")


TELLS = hasattr(torch._C, "_accelerator_getAllocatorSettings")
needs_settings = pytest.mark.skipif(not TELLS, reason="torch 2.11 does not tell its settings")


@contextmanager
def current(stream: object) -> Iterator[None]:
    yield


@pytest.fixture(autouse=True)
def _streams_of_paper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    NOTES.clear()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", current)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: NOTES.append("held"))
    before = settings() if TELLS else None
    yield
    if before is not None:
        torch._C._accelerator_setAllocatorSettings(before)


def in_a_thread(answer: object, gate: threading.Event | None = None) -> Callable[[], object]:
    def copy() -> object:
        assert threading.current_thread() is not threading.main_thread()
        assert not torch.is_grad_enabled()
        if gate is not None:
            assert gate.wait(timeout=10)
        return answer

    return copy


def test_copies_are_sent_in_order_and_bounded() -> None:
    own, gate, x = Lane(torch.device("cuda")), threading.Event(), torch.ones(1)
    first = own.send(in_a_thread(1, gate), x)
    threading.Timer(0.05, gate.set).start()
    rest = [own.send(in_a_thread(n)) for n in (2, 3)]
    assert len(own._sent) == lane.IN_FLIGHT == 1
    assert [sent.issued() for sent in (first, *rest)] == [1, 2, 3]
    own.drain()
    assert not own._sent
    assert NOTES.count("synchronize") == 3
    assert NOTES.count("held") == 1
    assert NOTES[-1] == "drained"


def test_an_error_in_the_thread_reaches_who_asks_and_who_sends() -> None:
    def fails() -> None:
        raise torch.OutOfMemoryError("full")

    own = Lane(torch.device("cuda"))
    sent = own.send(fails)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        sent.issued()
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        own.send(in_a_thread(1))
    assert own.send(in_a_thread(2)).issued() == 2


def test_a_cache_behind_the_thread_is_the_plain_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_layer, "SEGMENT", 70)
    monkeypatch.setattr(host_layer, "TAIL", 5)
    monkeypatch.setattr(host_layer, "Lane", lambda device: Lane(torch.device("cuda")))
    monkeypatch.setattr(host_layer, "_to_host", lambda x, pinned: x.clone())
    config = tiny_model(num_hidden_layers=3).config
    own, plain = HostCache(config), DynamicCache(config=config)
    for tokens in (150, 50, *[1] * 7):
        for layer in range(3):
            new = torch.randn(2, 1, 3, tokens, 16).unbind()
            got = own.update(*new, layer)
            expected = plain.update(*new, layer)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    for mine, other in zip(own.layers, plain.layers, strict=True):
        assert torch.equal(mine.keys, other.keys)
        assert mine.get_seq_length() == 207


def settings() -> str:
    return torch._C._accelerator_getAllocatorSettings()


@needs_settings
@pytest.mark.parametrize("given", ["", "garbage_collection_threshold:0.8"])
def test_pages_are_touched_before_they_are_pinned(given: str) -> None:
    """The option is torch's and of the whole process: it is on while the thread copies."""
    torch._C._accelerator_setAllocatorSettings(given)
    own = Lane(torch.device("cuda"))
    for _ in range(2):
        inside = own.send(settings).issued()
        assert inside.startswith(given)
        assert inside.count("pinned_use_cuda_host_register") == 1
        assert "pinned_use_cuda_host_register:True,pinned_num_register_threads:" in inside
        assert settings().startswith(given)
        assert "pinned_use_cuda_host_register:False" in settings()


@needs_settings
def test_what_the_user_said_of_pinning_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    given = "pinned_use_cuda_host_register:False"
    torch._C._accelerator_setAllocatorSettings(given)
    own = Lane(torch.device("cuda"))
    assert own.send(settings).issued() == settings() == given


@needs_settings
def test_a_torch_without_the_option_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(text: str) -> None:
        raise RuntimeError("Unrecognized key")

    own = Lane(torch.device("cuda"))
    with monkeypatch.context() as patch:
        patch.setattr(torch._C, "_accelerator_setAllocatorSettings", refuses)
        assert own.send(lambda: 3).issued() == 3
        patch.delattr(torch._C, "_accelerator_setAllocatorSettings")
        assert own.send(lambda: 4).issued() == 4
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:99")
    with monkeypatch.context() as patch:
        found = torch._C._accelerator_getAllocatorSettings
        patch.delattr(torch._C, "_accelerator_getAllocatorSettings")
        assert own.send(found).issued().startswith("max_split_size_mb:99,pinned_use")
