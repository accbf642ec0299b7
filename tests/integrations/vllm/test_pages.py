"""Reading pages: every layout from vLLM 0.20 to 0.33, strides, and packed CPU pages."""

from __future__ import annotations

import pytest
import torch

from minference.errors import UnsupportedError
from minference.integrations.vllm.pages import PackedPages, gather, split_kv

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
    key, value = gather(split_kv(cache, DIM, HEADS), table, 50)
    for got, pages in ((key, k), (value, v)):
        expected = pages[[4, 0, 6, 2]].flatten(0, 1)[:50].transpose(0, 1)[None]
        assert torch.equal(got, expected)
        assert got.stride(-1) == 1


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
    key, value = pages.gather(cache, torch.tensor([3, 1, 5], dtype=torch.int32), 37)
    for got, plain_pages in ((key, k), (value, v)):
        assert torch.equal(got[0], plain_pages[[3, 1, 5]].flatten(0, 1)[:37].transpose(0, 1))


def test_a_cache_that_changes_numbers_is_refused() -> None:
    def write(page: torch.Tensor, values: torch.Tensor) -> None:
        page.view(2, -1).copy_(values.flatten() * 0.5)

    with pytest.raises(UnsupportedError, match="unquantised"):
        PackedPages.probe(write, SIZE, DIM, torch.float32)
