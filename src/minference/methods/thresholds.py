"""From which length on a method is worth its index, by device. Floor 3."""

from minference.methods.base import Method

CPU_TOKENS = 4096
CUDA_TOKENS = 16384
"""Not yet measured end to end; an assumption on the safe side."""


def min_seq_len(method: Method, device_type: str) -> int:
    """Context length below which the dense kernel serves: the method's own, else the device's."""
    if method.min_seq_len is not None:
        return method.min_seq_len
    return CUDA_TOKENS if device_type == "cuda" else CPU_TOKENS
