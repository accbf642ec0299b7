"""Time a call with device events, or with the host clock on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

LONG_MS = 1500.0
"""A first call this long is a measurement: repeating it would cost more than it tells."""


@dataclass(frozen=True)
class Times:
    """Quantiles over the calls, in milliseconds, and how many calls there were."""

    ms_p20: float
    ms_p50: float
    ms_p80: float
    calls: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def once(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call; where the queue is empty, with what the host does for it."""
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(device)
    begin.record(stream)
    call()
    end.record(stream)
    end.synchronize()
    return begin.elapsed_time(end)


def measure(call: Callable[[], object], device: torch.device, *, calls: int = 7) -> Times:
    """Times `calls` calls after two that warm up; a call of seconds is timed once more only."""
    once(call, device)
    first = once(call, device)
    taken = [first] if first > LONG_MS else sorted(once(call, device) for _ in range(calls))
    last = len(taken) - 1
    low, middle, high = (taken[round(share * last)] for share in (0.2, 0.5, 0.8))
    return Times(round(low, 4), round(middle, 4), round(high, 4), len(taken))


def peak_extra_bytes(call: Callable[[], torch.Tensor], device: torch.device) -> int | None:
    """Most bytes that a call holds beyond what was there and its output; None on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    out = call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before - out.nbytes
