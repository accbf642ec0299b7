"""Small calls of the Hopper kernel for compute-sanitizer: every kind of list, mask and head dim.

    python benchmarks/sanitize.py [--one-lane]

benchmarks/sanitize.sh runs it under the four tools.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import torch

from minference.ops.attention.api import sparse_attention as attend
from minference.ops.attention.hopper.compile import Build
from minference.ops.attention.hopper.launch import sparse_attention
from minference.testing import layout_of, mixed_index, random_qkv

LARGEST_ERROR = 4e-3


def main() -> int:
    """Returns 1 if an output is wrong."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--one-lane", action="store_true", help="one lane arrives for its warp")
    extra = ("ARRIVING_LANES=1",) if given.parse_args().one_lane else ()
    worst = 0.0
    for dim in (64, 128):
        q, k, v = random_qkv(10, 2, 300, 500, batch=2, dim=dim, dtype=torch.bfloat16, device="cuda")
        layout = layout_of(q, k, left_padding=(37, 0), right_padding=(0, 45))
        index = mixed_index(layout, 10)
        build = replace(Build(dim, "bf16"), extra=extra)
        out, _ = sparse_attention(q, k, v, index, scale=dim**-0.5, build=build)
        expected = attend(q, k, v, index, impl="reference")
        assert isinstance(expected, torch.Tensor)
        error = (out.float() - expected.float()).norm() / expected.float().norm()
        worst = max(worst, float(error))
        print(f"head dim {dim}: relative error {float(error):.2e}")
    return int(not worst < LARGEST_ERROR)


if __name__ == "__main__":
    sys.exit(main())
