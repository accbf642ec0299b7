"""Launch parameters of the Triton kernels, a row a device class, and what host TMA needs.

The figures come from `minference bench attention` (benchmarks/results); nothing is tuned at run
time, so a first call costs one compilation.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

SIZES = [
    "q_len", "kv_len", "n_keys", "n_means", "n_cells", "n_blocks", "blocks", "tiles", "groups",
    "rated_groups", "programs", "bundles", "slots", "splits", "each", "stride", "first_tile",
    "first_group", "most", "wider", "wider_base", "every_base",
]  # fmt: skip
"""Arguments for whose values no kernel of the grouped estimate is compiled anew: a prompt of
another length would wait for it."""

REGISTERS = 128
"""Most of a thread with which two programs of 8 warps share a multiprocessor."""


class AttentionLaunch(NamedTuple):
    """How the attention kernel cuts its work."""

    rows: int
    """Query rows of a program: 128 or a part of it."""
    wide: int
    """Keys of a step over two neighbouring blocks or over packed columns: 128 or 64."""
    stages: int
    warps: int


HOPPER = {
    64: AttentionLaunch(128, 128, 3, 8),
    128: AttentionLaunch(128, 128, 3, 8),
    256: AttentionLaunch(128, 64, 2, 8),
}
BLACKWELL = HOPPER | {128: AttentionLaunch(128, 128, 2, 8)}
"""Compiled and not timed: a third stage does not fit."""
AMPERE = {
    64: AttentionLaunch(128, 64, 3, 4),
    128: AttentionLaunch(128, 64, 2, 8),
    256: AttentionLaunch(64, 64, 1, 4),
}
HOPPER_FP8 = {
    64: AttentionLaunch(64, 128, 3, 4),
    128: AttentionLaunch(64, 128, 3, 4),
    256: AttentionLaunch(64, 64, 2, 8),
}
ADA_FP8 = {
    64: AttentionLaunch(128, 64, 3, 8),
    128: AttentionLaunch(128, 64, 2, 8),
    256: AttentionLaunch(64, 64, 1, 4),
}
SINGLE_PRECISION = {
    64: AttentionLaunch(32, 64, 1, 4),
    128: AttentionLaunch(32, 64, 1, 8),
    256: AttentionLaunch(16, 64, 1, 8),
}
"""fp32 products run on the ordinary cores, so tiles stay small."""


MAX_HEAD_DIM = 256
WIDE_DIM = 128
"""Rows of a larger head dim take twice the shared memory."""
WIDE_FP32 = 144 << 10
"""Bytes of shared memory that a program takes of them in fp32."""
LOG2_E = math.log2(math.e)


def padded_dim(head_dim: int) -> int:
    """Columns of a tile that holds `head_dim` of them: a power of two, 16 at least."""
    return max(16, 1 << (head_dim - 1).bit_length())


def at_once(most: int, head_dim: int) -> int:
    """How many of what a program holds `most` of: half as many of a wide head dim, so that they fit
    the shared memory of every GPU."""
    return most if head_dim <= WIDE_DIM else most // 2


def log2_scaling(scale: float, softcap: float) -> tuple[float, float]:
    """Factor and ceiling of scores in units of log2; with a soft cap the factor is that of tanh's
    argument, doubled, as the kernels take tanh through exp2."""
    if softcap:
        return 2 * LOG2_E * scale / softcap, softcap * LOG2_E
    return scale * LOG2_E, 0.0


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; that of Hopper for the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def attention_launch(head_dim: int, dtype: torch.dtype, device: torch.device) -> AttentionLaunch:
    """The measured launch parameters for a head dim, a dtype and a device."""
    if dtype == torch.float32 and device.type == "cpu":
        # the interpreter pays for every program and every step
        return AttentionLaunch(128, 64, 1, 4)
    if dtype == torch.float32:
        return SINGLE_PRECISION[max(64, padded_dim(head_dim))]
    fp8 = dtype == torch.float8_e4m3fn
    tables = {9: (HOPPER, HOPPER_FP8), 10: (BLACKWELL, HOPPER_FP8)}
    # 12.x has as little shared memory as Ada
    table = tables.get(capability(device)[0], (AMPERE, ADA_FP8))[fp8]
    return table[max(64, padded_dim(head_dim))]


def tma_serves(*tensors: Tensor) -> bool:
    """Whether host TMA descriptors can address the tensors: Hopper or newer, 16-byte strides."""
    return all(
        x.is_cuda
        and capability(x.device) >= (9, 0)
        and x.dtype != torch.float32
        and x.data_ptr() % 16 == 0
        and all(step * x.element_size() % 16 == 0 for step in x.stride()[:-1])
        for x in tensors
    )
