"""Small calls of the Hopper kernel for compute-sanitizer: every kind of list, mask, head dim and
precision.

    python benchmarks/sanitize.py [--one-lane]

benchmarks/sanitize.sh runs it under the four tools.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import replace

import torch

from minference.ops.attention.api import sparse_attention as attend
from minference.ops.attention.hopper.launch import sparse_attention, tuned_build
from minference.testing import layout_of, mixed_index, random_qkv

LARGEST_ERROR = {"native": 4e-3, "fp8": 4e-2}


def main() -> int:
    """Returns 1 if an output is wrong."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--one-lane", action="store_true", help="one lane arrives for its warp")
    extra = ("ARRIVING_LANES=1",) if given.parse_args().one_lane else ()
    worst = 0.0
    for dim, fp8 in itertools.product((64, 128), (False, True)):
        q, k, v = random_qkv(10, 2, 300, 500, batch=2, dim=dim, dtype=torch.bfloat16, device="cuda")
        layout = layout_of(q, k, left_padding=(37, 0), right_padding=(0, 45))
        index = mixed_index(layout, 10)
        build = replace(tuned_build(dim, q.dtype, fp8=fp8), extra=extra)
        out, _ = sparse_attention(q, k, v, index, scale=dim**-0.5, fp8=fp8, build=build)
        precision = "fp8" if fp8 else "native"
        expected = attend(q, k, v, index, impl="reference", precision=precision)
        assert isinstance(expected, torch.Tensor)
        error = (out.float() - expected.float()).norm() / expected.float().norm()
        worst = max(worst, float(error) / LARGEST_ERROR[precision])
        print(f"head dim {dim}, {precision}: relative error {float(error):.2e}")
    return int(not worst < 1)


if __name__ == "__main__":
    sys.exit(main())
