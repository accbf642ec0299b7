"""Where a group's sampled rows lie and what they score: parts of the grouped estimate's kernels."""

import triton
import triton.language as tl

from minference.index import TILE
from minference.ops.groups.plan import GROUP_TILES

_TILE = tl.constexpr(TILE)
_TILES = tl.constexpr(GROUP_TILES)
MOST = tl.constexpr(100.0)
"""Log2 of the most that a key weighs, in units of what a row's sum is relative to."""


@triton.jit
def group_span(first_ptr, stop_ptr, q_len, kv_len, b, group):
    """First real query position of the chunk; first and past-the-last row of a group."""
    first = tl.load(first_ptr + b)
    begin = kv_len - q_len - first
    low = tl.maximum(begin, 0)
    start = (low // (_TILES * _TILE) + group) * (_TILES * _TILE)
    stop = tl.minimum(start + _TILES * _TILE, tl.load(stop_ptr + b) - first)
    return first, begin, tl.maximum(start, low), stop


@triton.jit
def log2_scores(scores, factor, ceiling, SOFTCAP: tl.constexpr):
    """Scores in units of log2."""
    if SOFTCAP:
        return ceiling - 2 * ceiling / (tl.exp2(scores * factor) + 1)
    return scores * factor
