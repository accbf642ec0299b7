"""Copies between a device and the host, on a stream of their own behind the compute."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

IN_FLIGHT = 2
"""Copies to the host that may be under way: what bounds the device memory that they hold."""


class Lane:
    """The copy stream of one device. On a CPU everything happens in line."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._leaving: deque[torch.cuda.Event] = deque()

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

    def leave(self) -> None:
        """Marks the end of a copy to the host, and waits while too many are under way."""
        if self._stream is None:
            return
        event = torch.cuda.Event()
        event.record(self._stream)
        self._leaving.append(event)
        while len(self._leaving) > IN_FLIGHT:
            self._leaving.popleft().synchronize()

    def join(self) -> None:
        """Lets the compute wait for every copy so far."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def drain(self) -> None:
        """Waits until the host sees every copy."""
        if self._stream is not None:
            self._stream.synchronize()
