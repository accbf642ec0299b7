"""Copies between a device and the host, on a stream of their own behind the compute."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

IN_FLIGHT = 1
"""Copies to the host that may be under way: what bounds the device memory that they hold."""

T = TypeVar("T")


class Sent(Generic[T]):
    """A copy to the host that may not have been issued yet; its error is raised by whoever asks."""

    def __init__(self, future: Future[tuple[T, torch.cuda.Event | None]]) -> None:
        self._future = future

    def issued(self) -> T:
        """What the copy gave, once it is issued: what the lane does next comes after it."""
        return self._future.result()[0]

    def wait(self) -> None:
        """Waits until the host sees it."""
        event = self._future.result()[1]
        if event is not None:
            event.synchronize()


class Lane:
    """The copy stream of one device. On a CPU everything happens in line.

    What leaves for the host is sent by a thread of its own: the first time that host memory is
    pinned takes several times as long as the copy, and the compute need not wait for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = None if self._stream is None else ThreadPoolExecutor(1, "minference-lane")
        self._sent: deque[Sent[Any]] = deque()

    def __deepcopy__(self, memo: object) -> Lane:
        return Lane(self._device)

    @property
    def pinned(self) -> bool:
        """Whether host memory must be pinned to be copied behind the compute."""
        return self._stream is not None

    @contextmanager
    def behind(self, *held: Tensor) -> Iterator[None]:
        """Copies issued inside start after the compute so far; `held` outlive them."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
        for tensor in held:
            tensor.record_stream(self._stream)

    def send(self, copy: Callable[[], T], *held: Tensor) -> Sent[T]:
        """Copies to the host after the compute so far, and waits while too many are under way.

        Args:
            copy: issues the copies; called in the lane's thread.
            *held: what it reads, which outlives it.
        """
        if self._stream is None or self._thread is None:
            done: Future[tuple[T, torch.cuda.Event | None]] = Future()
            done.set_result((copy(), None))
            return Sent(done)
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self._device))
        sent = Sent(self._thread.submit(_issue, copy, held, ready, self._stream))
        self._sent.append(sent)
        while len(self._sent) > IN_FLIGHT:
            self._sent.popleft().wait()
        return sent

    def join(self) -> None:
        """Lets the compute wait for every copy issued so far."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def drain(self) -> None:
        """Waits until the host sees every copy."""
        while self._sent:
            self._sent.popleft().wait()
        if self._stream is not None:
            self._stream.synchronize()


def _issue(
    copy: Callable[[], T],
    held: tuple[Tensor, ...],
    ready: torch.cuda.Event,
    stream: torch.cuda.Stream,
) -> tuple[T, torch.cuda.Event | None]:
    # neither the stream nor the grad mode of the calling thread holds in this one
    with torch.no_grad(), torch.cuda.stream(stream):
        stream.wait_event(ready)
        got = copy()
        gone = torch.cuda.Event()
        gone.record(stream)
    for tensor in held:
        tensor.record_stream(stream)
    return got, gone
