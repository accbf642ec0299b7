"""Rows packed to bytes and back: what the format keeps, on any layout, by torch and kernels."""

from __future__ import annotations

import pytest
import torch

from minference.ops.pack import api, reference, triton

LAYOUTS = ["contiguous", "token_major", "a_part"]


def rows(
    layout: str, dtype: torch.dtype = torch.float32, dim: int = 24, least: int = -6
) -> torch.Tensor:
    x = torch.randn(2, 77, 3, dim) * torch.logspace(least, 3, 77)[:, None, None]
    x[:, 5] = 0.0
    x = x.to(dtype)
    if layout == "token_major":
        return x.transpose(1, 2)
    x = x.transpose(1, 2).contiguous()
    return x if layout == "contiguous" else x[:, :, 3:70]


def error(got: torch.Tensor, given: torch.Tensor) -> float:
    given = given.float()
    largest = given.abs().amax(dim=-1, keepdim=True).clamp(min=1e-20)
    step = (given.abs() / 16).maximum(largest / 448 / 512)
    return float(((got.float() - given).abs() / step).max())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_number_keeps_one_part_in_sixteen(layout: str) -> None:
    x = rows(layout)
    data, scale = api.pack_rows(x)
    assert data.dtype == torch.uint8
    out = torch.full((2, 3, 90, 24), -1.0)
    api.unpack_rows(data, scale, out[:, :, 5 : 5 + x.shape[2]])
    assert error(out[:, :, 5 : 5 + x.shape[2]], x) < 1.01
    assert bool((out[:, :, :5] == -1).all())


@pytest.mark.usefixtures("nan_poison")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_do_what_torch_does(layout: str, device: torch.device) -> None:
    """The interpreter cuts off where the device rounds, and knows no subnormal numbers."""
    x = rows(layout).to(device)
    data, scale = triton.pack_rows(x)
    expected, expected_scale = reference.pack_rows(x.cpu())
    torch.testing.assert_close(scale.cpu(), expected_scale)
    got = torch.empty(2, 3, 90, 24, device=device)[:, :, 5 : 5 + x.shape[2]]
    triton.unpack_rows(data, scale, got)
    assert error(got, x) < (1.01 if device.type == "cuda" else 8.01)
    again = torch.empty_like(got)
    triton.unpack_rows(expected.to(device), expected_scale.to(device), again)
    written = torch.empty(x.shape)
    reference.unpack_rows(expected, expected_scale, written)
    torch.testing.assert_close(again.cpu(), written)
    if device.type == "cuda":
        assert float((data.cpu() != expected).float().mean()) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_a_gpu_is_packed_by_the_kernel(dtype: torch.dtype) -> None:
    # float16 itself is coarse below 1e-2 / 448
    x = rows("token_major", dtype, 128, least=-1).cuda()
    data, scale = api.pack_rows(x)
    out = torch.empty_like(x)
    api.unpack_rows(data, scale, out)
    # beside the format's own step, that of the result's type
    assert error(out, x) < 1.1
