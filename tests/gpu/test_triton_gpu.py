"""What only a GPU can show of the Triton kernels: bf16, long buffers, equal bits, no host reads."""

import pytest
import torch

from minference.bench.attention import gate_error
from minference.bench.cases import planted_index, vs1
from minference.ops.attention import triton as kernel
from minference.ops.attention.api import sparse_attention
from minference.ops.estimate.api import last_query_masses
from minference.ops.lines.api import best_lines
from minference.ops.select import lists
from minference.testing import layout_of, mixed_index, random_qkv, tolerance

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 129, 300, 1000])
@pytest.mark.usefixtures("nan_poison")
def test_bf16_matches_the_reference(length: int, device: torch.device) -> None:
    q, k, v = random_qkv(10, 2, length, dim=128, dtype=BF16, device=device)
    index = mixed_index(layout_of(q, k), 10)
    expected = sparse_attention(q, k, v, index, impl="reference")
    out = sparse_attention(q, k, v, index, impl="triton")
    torch.testing.assert_close(out, expected, **tolerance(BF16))
    assert torch.equal(out, sparse_attention(q, k, v, index, impl="triton"))


@pytest.mark.parametrize("dim", [64, 80, 96, 112, 192, 256])
def test_bf16_of_every_head_dim(dim: int, device: torch.device) -> None:
    q, k, v = random_qkv(5, 1, 333, dim=dim, dtype=BF16, device=device)
    index = mixed_index(layout_of(q, k), 5)
    expected = sparse_attention(q, k, v, index, impl="reference")
    torch.testing.assert_close(
        sparse_attention(q, k, v, index, impl="triton"), expected, **tolerance(BF16)
    )


def test_a_million_tokens_past_2_31_elements(device: torch.device) -> None:
    heads, length = 17, 1 << 20
    make = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, length, 128, device=device, dtype=BF16, generator=make)
        for _ in range(3)
    )
    assert q.numel() > 1 << 31
    index = planted_index(vs1(length, heads, 0), layout_of(q[:, :1], k[:, :1]))
    out = sparse_attention(q, k, v, index, impl="triton")
    assert gate_error(q, k, v, out, index) < 1e-2


def test_bf16_estimate_and_selection_of_a_long_prompt(device: torch.device) -> None:
    q, k, _ = random_qkv(8, 2, 64, 1 << 17, dim=128, dtype=BF16, device=device)
    layout = layout_of(q, k)
    expected = last_query_masses(q, k, layout.first, layout.stop, impl="torch")
    got = last_query_masses(q, k, layout.first, layout.stop, impl="triton")
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=2e-2)
    again = last_query_masses(q, k, layout.first, layout.stop, impl="triton")
    assert all(torch.equal(x, y) for x, y in zip(got, again, strict=True))
    budgets = tuple(range(0, 8000, 1000))
    lines = best_lines(q, k, layout.first, layout.stop, budgets, budgets, impl="triton")
    columns, offsets = lines.columns, lines.offsets
    same = lists.select_columns(got[0], budgets, 30)
    same_offsets, same_bits = lists.select_offsets(got[1], budgets, 100)
    assert torch.equal(lines.offset_bits, same_bits)
    for h in range(8):
        assert torch.equal(columns.row(0, h), same.row(0, h))
        assert torch.equal(offsets.row(0, h), same_offsets.row(0, h))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_the_host_never_waits_for_the_device(device: torch.device) -> None:
    q, k, v = random_qkv(4, 2, 300, dim=64, dtype=BF16, device=device)
    layout = layout_of(q, k)
    index = mixed_index(layout, 4)

    def everything() -> None:
        call = (q, k, layout.first, layout.stop)
        last_query_masses(*call, impl="triton")
        best_lines(*call, (10, 20, 30, 40), (1, 2, 3, 4), impl="triton")
        kernel.sparse_attention(q, k, v, index, scale=0.1)

    everything()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
