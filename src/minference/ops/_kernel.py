"""How kernels are compiled that are launched from Python."""

import functools
from collections.abc import Callable
from typing import Any

import triton


def kernel(function: Callable[..., None] | None = None, **options: Any) -> Any:  # noqa: ANN401
    """`triton.jit` for what is launched, with products fused with the sums that they go into.

    Triton does so by default up to 3.9, which warns that later versions will not; exponentials
    then cost an operation more for each score.

    Args:
        function: the kernel.
        **options: of `triton.jit`.
    """
    if function is None:
        return functools.partial(kernel, **options)
    made = triton.jit(function, **options)
    made.run = functools.partial(made.run, enable_fp_fusion=True)
    return made
