"""How kernels are compiled that are launched from Python, and on which GPU they run."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import triton


def kernel(function: Callable[..., None] | None = None, **options: Any) -> Any:  # noqa: ANN401
    """`triton.jit` for what is launched, with products fused with the sums that they go into, on
    the GPU of the first tensor that it is given.

    Triton fuses by default up to 3.9, which warns that later versions will not; exponentials then
    cost an operation more for each score. It launches on torch's current GPU, which a model that
    lies on several does not change from layer to layer.

    Args:
        function: the kernel.
        **options: of `triton.jit`.
    """
    if function is None:
        return functools.partial(kernel, **options)
    made = triton.jit(function, **options)
    launch = functools.partial(made.run, enable_fp_fusion=True)

    @functools.wraps(made.run)
    def run(*given: Any, **settings: Any) -> Any:  # noqa: ANN401
        with _gpu_of(given):
            return launch(*given, **settings)

    made.run = run
    return made


def _gpu_of(given: tuple[Any, ...]) -> contextlib.AbstractContextManager[Any]:
    device = next(one.device for one in given if isinstance(one, torch.Tensor))
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
