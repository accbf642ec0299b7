"""The Triton kernels against the reference: interpreted on the CPU, compiled where a GPU is."""

from dataclasses import replace

import pytest
import torch

from minference.bench.cases import Case, planted_index
from minference.errors import UnsupportedError
from minference.index import Ragged
from minference.ops._triton import AttentionLaunch
from minference.ops.attention import triton as kernel
from minference.ops.attention.api import sparse_attention
from minference.ops.attention.fp8 import rounded
from minference.ops.attention.triton_fp8 import quantise
from minference.ops.attention.triton_lists import pair_offsets
from minference.ops.build import dense_index, tri_shape_index
from minference.testing import layout_of, mixed_index, random_lines, random_qkv, tolerance

# Triton's interpreter turns one-element arrays into loop bounds
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.usefixtures("e4m3_rounding"),
]

E4M3 = torch.float8_e4m3fn
DTYPES = [torch.float16, torch.float32, E4M3]
LENGTHS = [(1, 1), (63, 63), (64, 64), (65, 65), (127, 127), (129, 129), (300, 300), (129, 300)]


def inputs(*sizes: int, dtype: torch.dtype, **options) -> tuple[torch.Tensor, ...]:  # noqa: ANN003
    """Random q, k, v; for fp8, what is quantised."""
    return random_qkv(*sizes, dtype=torch.float16 if dtype == E4M3 else dtype, **options)


def check(q, k, v, index, softcap=0.0, dtype=None, **options) -> None:  # noqa: ANN001, ANN003
    fp8 = dtype == E4M3
    expected, expected_lse = sparse_attention(
        q, k, v, index, softcap=softcap, return_lse=True, impl="reference",
        precision="fp8" if fp8 else "native",
    )  # fmt: skip
    options |= {"scale": q.shape[-1] ** -0.5, "softcap": softcap, "fp8": fp8}
    out, lse = kernel.sparse_attention(q, k, v, index, return_lse=True, **options)
    torch.testing.assert_close(out, expected, **tolerance(E4M3 if fp8 else q.dtype))
    torch.testing.assert_close(lse, expected_lse, atol=2e-3, rtol=1e-3)
    if fp8:
        # the weights are rounded against the largest one so far, by the reference against that of
        # the row
        assert (out.float() - expected.float()).norm() < 3e-2 * expected.float().norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "fp32", "fp8"])
@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)
@pytest.mark.usefixtures("nan_poison")
def test_mixed_heads_match_the_reference(
    q_len: int, kv_len: int, dtype: torch.dtype, device: torch.device
) -> None:
    q, k, v = inputs(5, 1, q_len, kv_len, dtype=dtype, device=device)
    check(q, k, v, mixed_index(layout_of(q, k), 5), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "fp32", "fp8"])
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.usefixtures("nan_poison")
def test_padding_on_both_sides_gives_zeros(dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = inputs(5, 5, 150, 160, batch=2, dtype=dtype, device=device)
    layout = layout_of(q, k, left_padding=(37, 0), right_padding=(0, 19))
    for x in (k, v):
        x[1, :, -19:] = torch.nan
    index = mixed_index(layout, 5)
    check(q, k, v, index, dtype=dtype)
    out, _ = kernel.sparse_attention(q, k, v, index, scale=0.1, fp8=dtype == E4M3)
    assert int(out[0, :, :27].count_nonzero()) == 0
    assert int(out[1, :, -19:].count_nonzero()) == 0


@pytest.mark.parametrize("cut", [1, 129, 299])
def test_chunks_give_the_rows_of_the_whole(cut: int, device: torch.device) -> None:
    q, k, v = random_qkv(2, 1, 300, dtype=torch.float16, device=device)
    whole = dense_index(layout_of(q, k), 2)
    out, _ = kernel.sparse_attention(q, k, v, whole, scale=0.2)
    for begin, end in ((0, cut), (cut, 300)):
        part = (q[:, :, begin:end], k[:, :, :end], v[:, :, :end])
        index = dense_index(layout_of(*part[:2]), 2)
        rows, _ = kernel.sparse_attention(*part, index, scale=0.2)
        torch.testing.assert_close(rows, out[:, :, begin:end], **tolerance(q.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "fp32", "fp8"])
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 112, 128, 192, 256])
def test_every_head_dim(dim: int, dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = inputs(2, 1, 66, 140, dim=dim, dtype=dtype, device=device)
    index = mixed_index(layout_of(q, k), 2)
    if dtype == E4M3 and dim < 32:
        with pytest.raises(UnsupportedError, match="32 products at once, got head dim 16"):
            kernel.sparse_attention(q, k, v, index, scale=1.0, fp8=True)
        return
    check(q, k, v, index, dtype=dtype)


def test_softcap_shared_lists_and_strides(device: torch.device) -> None:
    q, k, v = random_qkv(4, 2, 200, dim=64, dtype=torch.float16, device=device)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    index = mixed_index(layout_of(q, k), 2)
    check(q, k, v, index, softcap=5.0)
    check(q.float(), k.float(), v.float(), index, softcap=5.0)
    check(q, k, v, index, softcap=5.0, dtype=E4M3)
    check(q.float(), k.float(), v.float(), index, dtype=E4M3)


@pytest.mark.parametrize("launch", [(128, 64, 2, 4), (64, 128, 3, 4)])
@pytest.mark.parametrize("tma", [False, True])
def test_every_launch_gives_the_same(launch: tuple, *, tma: bool, device: torch.device) -> None:
    if tma and device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        pytest.skip("TMA needs a device of compute capability 9.0")
    q, k, v = random_qkv(5, 1, 150, dim=64, dtype=torch.float16, device=device)
    index = mixed_index(layout_of(q, k), 5)
    for dtype in (q.dtype, E4M3):
        check(q, k, v, index, dtype=dtype, launch=AttentionLaunch(*launch), tma=tma)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "fp32", "fp8"])
def test_more_columns_than_are_looked_up_at_once(dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = inputs(2, 1, 150, 2300, dim=32, dtype=dtype, device=device)
    layout = layout_of(q, k, left_padding=(30,))
    lines = random_lines(2200, columns=1400, clusters=3, width=70, band=30)
    index = planted_index(Case("", (lines,) * 2, (1400,) * 2, (240,) * 2), layout)
    check(q, k, v, index, dtype=dtype)
    # rows of a window see fewer of them
    check(q, k, v, replace(index, window=index.window.clamp(max=900)), dtype=dtype)


def test_no_columns_at_all(device: torch.device) -> None:
    q, k, v = random_qkv(2, 1, 150, dim=32, dtype=torch.float16, device=device)
    lines = random_lines(150, columns=0, clusters=1, width=10, band=30)
    index = planted_index(Case("", (lines,) * 2, (0,) * 2, (40,) * 2), layout_of(q, k))
    assert not index.columns.values.numel()
    check(q, k, v, index)


def test_each_head_has_its_fp8_scales(device: torch.device) -> None:
    q, k, v = random_qkv(4, 2, 150, dim=32, device=device)
    index = mixed_index(layout_of(q, k), 4)
    scale = 32**-0.5
    out, lse = kernel.sparse_attention(q, k, v, index, scale=scale, fp8=True, return_lse=True)
    # powers of two leave every rounding as it was, so a shared scale alone would tell
    up = torch.tensor([2.0**20, 2.0**-20], device=device)[None, :, None, None]
    q, k = q / up.repeat_interleave(2, 1), k * up
    again = kernel.sparse_attention(q, k, v * up, index, scale=scale, fp8=True, return_lse=True)
    torch.testing.assert_close(again[0], out * up.repeat_interleave(2, 1))
    torch.testing.assert_close(again[1], lse)


def test_values_turn_as_a_whole_or_by_blocks(device: torch.device) -> None:
    _, _, v = random_qkv(1, 2, 150, batch=2, dim=32, device=device)
    layout = layout_of(v, v, left_padding=(37, 0), right_padding=(0, 20))
    bounds = (layout.first, layout.stop, 0)
    whole = quantise(v, *bounds, anchored=True, turned=True)
    assert whole.data.shape == (2, 2, 32, 192)
    blocks = quantise(v, *bounds, anchored=True, blocked=True)
    assert torch.equal(blocks.data.float().transpose(2, 3).flatten(3), whole.data.float())
    # 16 keys lie as 0 1 8 9, 2 3 10 11, 4 5 12 13, 6 7 14 15
    order = torch.tensor([0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15], device=device)
    rows = torch.arange(0, 192, 16, device=device)[:, None] + order
    rounded_v = torch.nn.functional.pad(rounded(v, *bounds), (0, 0, 0, 192))
    expected = torch.stack(
        [x[:, at:][:, rows.flatten()] for x, at in zip(rounded_v, (37, 0), strict=True)]
    )
    torch.testing.assert_close(
        whole.data.float() * whole.scale[..., None, None], expected.transpose(2, 3)
    )


def test_zeros_are_served_in_fp8(device: torch.device) -> None:
    q, k, v = (x * 0 for x in random_qkv(2, 1, 70, dim=32, device=device))
    out, _ = kernel.sparse_attention(q, k, v, mixed_index(layout_of(q, k), 2), scale=1.0, fp8=True)
    assert torch.equal(out, q)


def test_lists_that_share_memory_are_read_whole(device: torch.device) -> None:
    q, k, v = random_qkv(2, 2, 300, dtype=torch.float16, device=device)
    check(q, k, v, tri_shape_index(layout_of(q, k), (20, 3), (70, 100), (40, 1)))


def test_offsets_split_into_pairs_and_singles(device: torch.device) -> None:
    rows = [[-1, 0, 1, 2, 3, 7, 8, 11], [0, 2, 3, 4, 5], [-1]]
    rows.append([*range(-1, 2000), *range(3000, 6000, 3)])
    values = torch.tensor([o for row in rows for o in row], dtype=torch.int32, device=device)
    counts = [len(row) for row in rows]
    count = torch.tensor(counts, dtype=torch.int32, device=device)[None, None]
    start = (count.cumsum(-1) - count).long()
    steps, place, plan = pair_offsets(Ragged(values, start, count))
    expected = [([1, 7], [3, 11], 5), ([2, 4], [], 0), ([], [], 1)]
    expected.append((list(range(1, 1999, 2)), [1999, *range(3000, 6000, 3)], 2001))
    for g, (pairs, singles, local) in enumerate(expected):
        own = steps[place[0, 0, g] : place[0, 0, g] + counts[g]].tolist()
        assert plan[0, 0, g].tolist() == [len(pairs), len(singles), local, 1]
        assert own[: len(pairs)] == pairs
        assert own[::-1][: len(singles)] == singles


def test_large_head_dims_are_refused(device: torch.device) -> None:
    q, k, v = random_qkv(1, 1, 4, dim=320, device=device)
    with pytest.raises(UnsupportedError, match="up to 256, got 320"):
        kernel.sparse_attention(q, k, v, dense_index(layout_of(q, k), 1), scale=1.0)


def test_the_operator_reaches_the_kernel(device: torch.device) -> None:
    q, k, v = random_qkv(4, 2, 70, dtype=torch.float16, device=device)
    index = mixed_index(layout_of(q, k), 4)
    expected = sparse_attention(q, k, v, index, impl="reference")
    out = sparse_attention(q, k, v, index, impl="triton")
    torch.testing.assert_close(out, expected, **tolerance(q.dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["native", "fp8"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_runs_do_not_differ(dim: int, precision: str) -> None:
    device = torch.device("cuda")
    if precision == "fp8" and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("fp8 needs a device of compute capability 8.9")
    q, k, v = random_qkv(8, 2, 1111, 1300, dim=dim, dtype=torch.bfloat16, device=device)
    index = mixed_index(layout_of(q, k), 8)
    expected = sparse_attention(q, k, v, index, impl="reference", precision=precision)
    out = sparse_attention(q, k, v, index, impl="triton", precision=precision)
    again = sparse_attention(q, k, v, index, impl="triton", precision=precision)
    assert torch.equal(out, again)
    error = (out.float() - expected.float()).norm() / expected.float().norm()
    assert error < (3e-2 if precision == "fp8" else 5e-3)


@pytest.mark.gpu
def test_fp8_at_other_head_dims_is_triton_and_hopper_refuses_it() -> None:
    device = torch.device("cuda")
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    q, k, v = random_qkv(4, 2, 70, dim=96, dtype=torch.bfloat16, device=device)
    index = mixed_index(layout_of(q, k), 4)
    out = sparse_attention(q, k, v, index, precision="fp8")
    assert torch.equal(out, sparse_attention(q, k, v, index, precision="fp8", impl="triton"))
    with pytest.raises(UnsupportedError, match="for fp8 use impl='triton'"):
        sparse_attention(q, k, v, index, precision="fp8", impl="hopper")
