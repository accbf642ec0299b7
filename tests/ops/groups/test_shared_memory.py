"""The grouped method's kernels fit the shared memory of GPUs that the tests do not run on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

A100, L4 = 163 << 10, 99 << 10
"""Shared memory that a program may have, NVIDIA's CUDA programming guide, compute capabilities."""


@pytest.mark.parametrize(("capability", "dim", "most"), [(80, 256, A100), (89, 256, L4)])
def test_kernels_fit_smaller_gpus(capability: int, dim: int, most: int) -> None:
    program = Path(__file__).with_name("compile_call.py")
    plain = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(program), str(capability), str(dim)],
        env=plain, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shared = {name: int(size) for name, size in map(str.split, done.stdout.splitlines())}
    assert {"sum_rows", "rate_cells", "score_candidates", "_row_sums", "_join_samples"} <= set(
        shared
    )
    assert not {name: size for name, size in shared.items() if size > most}
