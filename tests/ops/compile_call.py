"""Compile what long calls launch, of the grouped method and of the last-query estimate, for a GPU
that need not be there: a program, since kernels that are interpreted cannot be compiled. Writes the
shared memory of each.

    python tests/ops/compile_call.py 89 256 bfloat16
"""

import sys
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from minference.ops import _triton

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}
ALIGNED = [["tt.divisibility", 16]]
CAPABILITY, DIM, DTYPE = int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3])


def type_of(value: Any) -> Any:
    """The type of an argument in a kernel's signature."""
    if isinstance(value, tuple):
        return tuple(map(type_of, value))
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
    if value is None:
        return "constexpr"
    return "fp32" if isinstance(value, float) else "i32"


def facts(
    value: Any, path: tuple[int, ...], constants: dict[Any, Any], known: dict[Any, Any]
) -> None:
    """Adds which parts of an argument are constants, and which are multiples of 16."""
    if isinstance(value, tuple):
        for at, part in enumerate(value):
            facts(part, (*path, at), constants, known)
    elif value is None:
        constants[path] = None
    elif isinstance(value, TensorDescriptor):
        return
    elif isinstance(value, Tensor) or (len(path) > 1 and value % 16 == 0):
        known[path] = ALIGNED


def compile_launch(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
    """In place of a launch."""
    assert named["enable_fp_fusion"], kernel.__name__
    given = dict(zip(kernel.arg_names, args, strict=False)) | named
    signature, constants, known = {}, {}, {}
    for at, parameter in enumerate(kernel.params):
        value = given.pop(parameter.name)
        if parameter.is_constexpr:
            signature[parameter.name], constants[(at,)] = "constexpr", value
        else:
            signature[parameter.name] = type_of(value)
            facts(value, (at,), constants, known)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=known)
    options = {"num_stages": 3} | {name: value for name, value in given.items() if value}
    done = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=options)
    sys.stdout.write(f"{kernel.__name__} {done.metadata.shared}\n")


if __name__ == "__main__":
    patch.object(JITFunction, "run", compile_launch).start()
    patch.object(_triton, "capability", lambda device: divmod(CAPABILITY, 10)).start()
    patch.object(_triton, "tma_serves", lambda *tensors: CAPABILITY >= 90).start()

    from minference.ops.attention.triton import sparse_attention
    from minference.ops.attention.triton_samples import join_samples
    from minference.ops.build import assemble
    from minference.ops.estimate.triton import line_sums
    from minference.ops.groups.plan import Plan
    from minference.ops.groups.triton import grouped_blocks, read_keys
    from minference.ops.groups.triton_levels import guard
    from minference.testing import layout_of

    q, k = (torch.ones(1, heads, 17000, DIM, dtype=DTYPE) for heads in (8, 2))
    layout, plan = layout_of(q, k), Plan(rows=64, mass=0.98, most=12, wider=128, candidates=128)
    line_sums(q, k, layout.first, layout.stop, scale=0.1)
    cells = read_keys(k, layout, plan, 0.0)
    lists, wider = grouped_blocks(q, cells, layout, plan, scale=0.1)
    guard(q, k, lists, wider, layout, 0.03, scale=0.1)
    index = assemble(layout, 2, blocks=lists, group_tiles=1, samples=256, sample_share=0.02)
    # on a CPU fp32 has launches of its own
    exact = q.dtype == torch.float32
    launch = _triton.attention_launch(DIM, DTYPE, torch.device("cuda")) if exact else None
    if CAPABILITY >= 89 and not exact:
        sparse_attention(q, k, k, index, scale=0.1, fp8=True)
    out, lse = sparse_attention(q, k, k, index, scale=0.1, return_lse=True, launch=launch)
    join_samples(q, k, k, index, out, lse, scale=0.1, launch=launch)
