"""Attention over pages against the contiguous operation: layouts, page sizes, kinds of index."""

import pytest
import torch
from torch import Tensor

from minference.errors import UnsupportedError
from minference.index import SparseIndex
from minference.ops.attention.api import sparse_attention
from minference.ops.attention.paged import gather_pages, paged_sparse_attention
from minference.ops.build import dense_index
from minference.testing import layout_of, mixed_index, random_qkv, tolerance

# Triton's interpreter turns one-element arrays into loop bounds
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

DTYPES = [torch.float16, torch.float32]
LAYOUTS = ["keys first", "pages first", "heads first", "tokens first"]


def empty_cache(layout: str, pages: int, size: int, heads: int, like: Tensor) -> list[Tensor]:
    """Views [pages, size, Hkv, D] of a cache as vLLM lays it out, by version; NaN all over."""
    dim = like.shape[-1]
    if layout == "keys first":  # up to 0.22
        return list(like.new_full((2, pages, size, heads, dim), torch.nan).unbind(0))
    if layout == "pages first":  # 0.24
        return list(like.new_full((pages, 2, size, heads, dim), torch.nan).unbind(1))
    if layout == "heads first":  # from 0.26, HND
        cache = like.new_full((pages, heads, size, 2 * dim), torch.nan).transpose(1, 2)
    else:  # from 0.26, NHD
        cache = like.new_full((pages, size, heads, 2 * dim), torch.nan)
    return list(cache.split(dim, dim=-1))


def paged(k: Tensor, v: Tensor, size: int, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """The same keys and values in pages in random order, and the table; unused places are NaN."""
    batch, heads, length, _ = k.shape
    width = -(-length // size)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(batch * width + 3, generator=generator)[: batch * width]
    table = order.view(batch, width).int()
    caches = empty_cache(layout, batch * width + 3, size, heads, k)
    for cache, x in zip(caches, (k, v), strict=True):
        for b in range(batch):
            for n in range(length):
                cache[int(table[b, n // size]), n % size] = x[b, :, n]
    # entries past the context are never read
    table = torch.cat([table, torch.full((batch, 2), 1 << 30, dtype=torch.int32)], dim=1)
    return caches[0], caches[1], table.to(k.device)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: SparseIndex,
    size: int,
    layout: str,
    softcap: float = 0.0,
) -> None:
    expected = sparse_attention(q, k, v, index, softcap=softcap, impl="reference")
    pages = paged(k, v, size, layout)
    for impl in ("reference", "triton"):
        out = paged_sparse_attention(q, *pages, index, softcap=softcap, impl=impl)
        torch.testing.assert_close(out, expected, **tolerance(q.dtype))


# values past a context's end are multiplied by zero only after they are masked
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "fp32"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("nan_poison")
def test_every_layout_and_kind_of_index(
    layout: str, dtype: torch.dtype, device: torch.device
) -> None:
    q, k, v = random_qkv(5, 1, 50, 200, dtype=dtype, device=device)
    check(q, k, v, mixed_index(layout_of(q, k), 5), 16, layout)


@pytest.mark.parametrize(("size", "dtype"), [(48, 0), (128, 0), (272, 0), (48, 1)])
def test_every_page_size_with_grouped_heads(size: int, dtype: int, device: torch.device) -> None:
    q, k, v = random_qkv(4, 2, 20, 100, dim=64, batch=2, dtype=DTYPES[dtype], device=device)
    check(q, k, v, mixed_index(layout_of(q, k), 4), size, "heads first", softcap=5.0)


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (63, 63), (65, 65), (2, 130)])
def test_lengths_around_a_block(q_len: int, kv_len: int, device: torch.device) -> None:
    q, k, v = random_qkv(3, 1, q_len, kv_len, dtype=torch.float16, device=device)
    check(q, k, v, mixed_index(layout_of(q, k), 3), 16, "keys first")


def test_sinks_are_those_of_the_contiguous_operation(device: torch.device) -> None:
    q, k, v = random_qkv(4, 2, 65, device=device)
    index, sinks = dense_index(layout_of(q, k), 4), torch.randn(4, device=device)
    expected = sparse_attention(q, k, v, index, sinks=sinks, impl="reference")
    for impl in ("auto", "torch", "triton"):
        pages = paged(k, v, 16, "pages first")
        out = paged_sparse_attention(q, *pages, index, sinks=sinks, impl=impl)
        torch.testing.assert_close(out, expected, **tolerance(q.dtype))


def test_the_operator_matches_its_fake_version(device: torch.device) -> None:
    q, k, v = random_qkv(2, 1, 65, device=device)
    index = dense_index(layout_of(q, k), 2)
    lists = [x.contiguous() for x in index.tensors()]
    for impl, need_lse in (("torch", False), ("triton", True)):
        args = (q, *paged(k, v, 16, "heads first"), lists, 65, 0.125, 0.0, need_lse, impl)
        torch.library.opcheck(
            torch.ops.minference.paged_sparse_attention,
            args,
            test_utils=("test_schema", "test_faketensor"),
        )


def test_gathered_pages_are_the_context() -> None:
    _, k, v = random_qkv(2, 2, 40, batch=2)
    k_cache, v_cache, table = paged(k, v, 16, "tokens first")
    assert torch.equal(gather_pages(k_cache, table, 40), k)
    assert torch.equal(gather_pages(v_cache, table, 40), v)


def test_bad_calls_are_refused() -> None:
    q, k, v = random_qkv(2, 1, 40)
    index = dense_index(layout_of(q, k), 2)
    k_cache, v_cache, table = paged(k, v, 16, "heads first")
    call = paged_sparse_attention
    with pytest.raises(UnsupportedError, match="Hopper kernel does not read pages"):
        call(q, k_cache, v_cache, table, index, impl="hopper")
    with pytest.raises(ValueError, match="at least 16 tokens, got 8"):
        call(q, k_cache[:, :8], v_cache[:, :8], table, index)
    with pytest.raises(ValueError, match=r"int32 \[1, at least 3\]"):
        call(q, k_cache, v_cache, table[:, :2], index)
    with pytest.raises(ValueError, match="int32"):
        call(q, k_cache, v_cache, table.long(), index)
    with pytest.raises(ValueError, match="pages outside"):
        call(q, k_cache, v_cache, table + 100, index)
    with pytest.raises(ValueError, match="quantised cache"):
        call(q, k_cache.half(), v_cache.half(), table, index)
    with pytest.raises(ValueError, match="must both be"):
        call(q, k_cache, v_cache[..., :8], table, index)
    shifted = k_cache.transpose(1, 3).contiguous().transpose(1, 3)
    with pytest.raises(ValueError, match="adjacent"):
        call(q, shifted, v_cache, table, index)
    with pytest.raises(ValueError, match="index must be built for"):
        call(q[:, :, 1:], k_cache, v_cache, table, index)
