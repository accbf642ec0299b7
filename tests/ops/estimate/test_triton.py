"""The fused estimate against the reference: interpreted on the CPU, compiled where a GPU is."""

import pytest
import torch

from minference.ops.estimate import triton as kernel
from minference.ops.estimate.api import last_query_masses
from minference.testing import layout_of, random_qkv

# Triton's interpreter turns one-element arrays into loop bounds
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")


def check(q, k, layout, dtype, **options) -> None:  # noqa: ANN001, ANN003
    args = (q, k, layout.first, layout.stop)
    expected = last_query_masses(*args, impl="reference", **options)
    got = last_query_masses(*args, impl="triton", **options)
    close = 1e-5 if dtype == torch.float32 else 2e-3
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, atol=close, rtol=close)
    again = last_query_masses(*args, impl="triton", **options)
    assert all(torch.equal(x, y) for x, y in zip(got, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize(
    ("q_len", "kv_len"), [(1, 1), (10, 70), (63, 63), (64, 64), (65, 65), (129, 300), (300, 300)]
)
@pytest.mark.usefixtures("nan_poison")
def test_masses_match_the_reference(
    q_len: int, kv_len: int, dtype: torch.dtype, device: torch.device
) -> None:
    q, k, _ = random_qkv(6, 2, q_len, kv_len, dtype=dtype, device=device)
    check(q, k, layout_of(q, k), dtype)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.usefixtures("nan_poison")
def test_padding_softcap_rows_and_strides(softcap: float, device: torch.device) -> None:
    q, k, _ = random_qkv(4, 4, 150, 300, batch=3, dim=80, dtype=torch.float16, device=device)
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    layout = layout_of(q, k, left_padding=(0, 37, 270), right_padding=(0, 5, 0))
    check(q, k, layout, q.dtype, softcap=softcap, rows=40)


@pytest.mark.parametrize(("heads", "dim"), [(14, 32), (6, 256)])
def test_masses_of_all_heads_of_a_kv_head(heads: int, dim: int, device: torch.device) -> None:
    q, k, _ = random_qkv(heads, 2, 200, dim=dim, dtype=torch.float16, device=device)
    check(q, k, layout_of(q, k), q.dtype)


def test_too_many_rows_are_refused(device: torch.device) -> None:
    q, k, _ = random_qkv(1, 1, 200, device=device)
    layout = layout_of(q, k)
    with pytest.raises(ValueError, match="1 to 64"):
        kernel.last_query_masses(q, k, layout.first, layout.stop, scale=1.0, rows=100)
