"""Reading pages: every layout from vLLM 0.20 to 0.33, strides, and packed CPU pages."""

from __future__ import annotations

import pytest
import torch

from minference.errors import UnsupportedError
from minference.integrations.vllm.pages import (
    PackedPages,
    PackedRequest,
    PagedRequest,
    split_kv,
)
from minference.ops._dispatch import interpreted
from minference.ops.build import dense_index
from minference.testing import layout_of, random_qkv, tolerance

PAGES, SIZE, HEADS, DIM = 7, 16, 3, 8


def plain() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(PAGES, SIZE, HEADS, DIM), torch.randn(PAGES, SIZE, HEADS, DIM)


@pytest.mark.parametrize("layout", ["0.22", "0.24", "0.26", "0.26-nhd"])
def test_every_layout_gives_the_same_context(layout: str) -> None:
    k, v = plain()
    both = torch.cat([k, v], dim=-1)
    cache = {
        "0.22": torch.stack([k, v]),
        "0.24": torch.stack([k, v], dim=1),
        "0.26": both.transpose(1, 2).contiguous(),
        "0.26-nhd": both.transpose(1, 2),
    }[layout]
    table = torch.tensor([4, 0, 6, 2, 5], dtype=torch.int32)
    request = PagedRequest(*split_kv(cache, DIM, HEADS), table, 50)
    everything = slice(0, HEADS)
    for got, pages in ((request.keys(everything), k), (request.values(everything), v)):
        expected = pages[[4, 0, 6, 2]].flatten(0, 1)[:50].transpose(0, 1)[None]
        assert torch.equal(got, expected)
        assert got.stride(-1) == 1
    assert torch.equal(request.values(slice(1, 2)), request.values(everything)[:, 1:2])


def test_other_layouts_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="unknown KV cache"):
        split_kv(torch.zeros(PAGES, SIZE, HEADS, DIM), DIM, HEADS)
    with pytest.raises(UnsupportedError, match="keys first or pages first"):
        split_kv(torch.zeros(2, 2, SIZE, HEADS, DIM), DIM, HEADS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packing_is_found_and_undone(dtype: torch.dtype) -> None:
    order = torch.randperm(SIZE * DIM)

    def write(page: torch.Tensor, values: torch.Tensor) -> None:
        halves = page.view(2, SIZE * DIM)
        halves[0] = values.flatten()[order]
        halves[1] = values.flatten()

    pages = PackedPages.probe(write, SIZE, DIM, dtype)
    assert pages.value_order is None
    k, v = (x.to(dtype) for x in plain())
    cache = torch.empty(PAGES, HEADS, SIZE, 2 * DIM, dtype=dtype)
    for page in range(PAGES):
        for head in range(HEADS):
            halves = cache[page, head].view(2, -1)
            halves[0] = k[page, :, head].flatten()[order]
            halves[1] = v[page, :, head].flatten()
    request = PackedRequest(pages, cache, torch.tensor([3, 1, 5], dtype=torch.int32), 37)
    heads = slice(1, 3)
    for got, plain_pages in ((request.keys(heads), k), (request.values(heads), v)):
        expected = plain_pages[[3, 1, 5]].flatten(0, 1)[:37].transpose(0, 1)
        assert torch.equal(got[0], expected[heads])


def test_a_cache_that_changes_numbers_is_refused() -> None:
    def write(page: torch.Tensor, values: torch.Tensor) -> None:
        page.view(2, -1).copy_(values.flatten() * 0.5)

    with pytest.raises(UnsupportedError, match="unquantised"):
        PackedPages.probe(write, SIZE, DIM, torch.float32)


def test_parts_are_equal_and_fit_the_workspace() -> None:
    pages = torch.zeros(4, SIZE, 6, DIM)
    request = PagedRequest(pages, pages, torch.arange(4, dtype=torch.int32), 64)
    head = 2 * 64 * DIM * 4
    assert request.head_bytes == head
    assert request.parts(6 * head) == [slice(0, 6)]
    assert request.parts(5 * head) == [slice(0, 3), slice(3, 6)]
    assert request.parts(1) == [slice(n, n + 1) for n in range(6)]


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
def test_triton_reads_the_pages_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    if not interpreted():
        pytest.skip("Triton runs on the CPU only with TRITON_INTERPRET=1")
    q, k, v = random_qkv(4, 2, 20, 60, dim=16)
    cache = torch.zeros(PAGES, 2, SIZE, 32)
    table = torch.tensor([4, 0, 6, 2], dtype=torch.int32)
    for n in range(60):
        cache[table[n // SIZE], :, n % SIZE] = torch.cat([k[0, :, n], v[0, :, n]], dim=-1)
    request = PagedRequest(*split_kv(cache, 16, 2), table, 60)
    index = dense_index(layout_of(q, k), 4)
    heads, options = slice(0, 2), {"scale": 0.2, "softcap": 0.0, "sinks": torch.randn(4)}
    copied = request.attend(q, request.keys(heads), heads, index, impl="torch", **options)
    monkeypatch.setattr(PagedRequest, "values", None)
    in_place = request.attend(q, request.keys(heads), heads, index, impl="triton", **options)
    torch.testing.assert_close(in_place, copied, **tolerance(q.dtype))
