"""Copies between a device and the host, on a stream of their own behind the compute."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from minference.log import info_once

IN_FLIGHT = 1
"""Copies to the host that may be under way: what bounds the device memory that they hold."""

_PIN = "pinned_use_cuda_host_register"
_THREADS = "pinned_num_register_threads"

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
    with torch.no_grad(), torch.cuda.stream(stream), pages_touched_first():
        stream.wait_event(ready)
        got = copy()
        gone = torch.cuda.Event()
        gone.record(stream)
    for tensor in held:
        tensor.record_stream(stream)
    return got, gone


@contextmanager
def pages_touched_first() -> Iterator[None]:
    """Host memory pinned inside is touched by several threads before the driver is asked.

    cudaHostAlloc holds the driver while it clears the pages, and the compute then cannot be
    launched. torch has the other way as an option of the process; what the user said of it stays,
    and a torch without the option goes on as ever.
    """
    read = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
    write = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    given = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    # what this function leaves behind is no word of the user
    before = (read() if read else given).removesuffix(_settings(own=False)).removesuffix(",")
    if write is None or "pinned_" in before:
        yield
        return
    try:
        write(_settings(before, own=True))
    except RuntimeError as error:
        info_once(f"host memory is pinned while the compute waits: {error}")
        yield
        return
    try:
        yield
    finally:
        write(_settings(before, own=False))


def _settings(before: str = "", *, own: bool) -> str:
    threads = 1 << (min(8, os.cpu_count() or 1).bit_length() - 1) if own else 1
    return ",".join([*([before] if before else []), f"{_PIN}:{own},{_THREADS}:{threads}"])
