"""Read one request's keys and values out of vLLM's pages, whatever their layout.

The layout changed three times between vLLM 0.20 and 0.33, and CPU kernels pack keys in an order
of their own, so nothing here indexes a cache by an assumed shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minference.errors import UnsupportedError

Context = tuple[Tensor, Tensor]
"""Keys and values of one request, each [1, Hkv, N, D]."""


def split_kv(cache: Tensor, head_size: int, kv_heads: int) -> Context:
    """Views of a GPU cache's keys and values, each [pages, page_size, Hkv, D].

    Serves (2, pages, size, Hkv, D) up to vLLM 0.22, (pages, 2, size, Hkv, D) of 0.24, and
    (pages, Hkv, size, 2 D) from 0.26 on, in either stride order.

    Raises:
        UnsupportedError: any other shape, or one that fits two of them.
    """
    shape = tuple(cache.shape)
    if len(shape) == 5 and shape[3:] == (kv_heads, head_size) and 2 in shape[:2]:
        if shape[0] == shape[1] == 2:
            raise UnsupportedError(
                f"a KV cache of shape {list(shape)} may hold keys first or pages first; give the "
                f"engine more than two pages"
            )
        key, value = cache.unbind(0 if shape[0] == 2 else 1)
        return key, value
    if len(shape) == 4 and shape[1] == kv_heads and shape[3] == 2 * head_size:
        key, value = cache.transpose(1, 2).split(head_size, dim=-1)
        return key, value
    raise UnsupportedError(
        f"unknown KV cache of shape {list(shape)} for {kv_heads} KV heads of {head_size}; this "
        f"vLLM's layout is not supported, see docs/vllm.md"
    )


def gather(pages: Context, table: Tensor, length: int) -> Context:
    """Copies the first `length` tokens of a request's pages: one layer's K and V at a time.

    Args:
        pages: keys and values, each [pages, page_size, Hkv, D], any strides.
        table: numbers of the request's pages, in order.
        length: tokens of the context.
    """
    size = pages[0].shape[1]
    own = table[: -(-length // size)].long()
    key, value = (part[own].flatten(0, 1)[:length].transpose(0, 1)[None] for part in pages)
    return key, value


@dataclass(frozen=True, eq=False)
class PackedPages:
    """Pages [pages, Hkv, page_size, 2 D] of vLLM's CPU kernels: in each, the keys come first and
    the values last, each half in an order that depends on the processor.

    Attributes:
        key_order: for element (token, dim) of a page, where its key lies in the page's first
            half; None where that is the plain order.
        value_order: likewise for values in the second half.
        page_size: tokens of a page.
        head_size: elements of a head.
    """

    key_order: Tensor | None
    value_order: Tensor | None
    page_size: int
    head_size: int

    @classmethod
    def probe(
        cls,
        write: Callable[[Tensor, Tensor], None],
        page_size: int,
        head_size: int,
        dtype: torch.dtype,
    ) -> PackedPages:
        """Finds the orders by writing a page of known numbers with vLLM's own kernel.

        Args:
            write: fills one page [1, 1, page_size, 2 D] with keys and values [page_size, 1, D].
            page_size: tokens of a page.
            head_size: elements of a head.
            dtype: of the cache; its numbers up to 127 must be exact.

        Raises:
            UnsupportedError: the kernel does more than move elements.
        """
        count = page_size * head_size
        number = torch.arange(count)
        found = torch.zeros(2, count, dtype=torch.int64)
        for digit in range(3):
            values = ((number >> (7 * digit)) & 127).to(dtype).view(page_size, 1, head_size)
            page = torch.zeros((1, 1, page_size, 2 * head_size), dtype=dtype)
            write(page, values)
            found += page.view(2, count).long() << (7 * digit)
        if bool((found.sort(dim=-1).values != number).any()):
            raise UnsupportedError(
                f"vLLM's CPU cache of {dtype} does not hold keys as they are; use an unquantised "
                f"KV cache (kv_cache_dtype='auto')"
            )
        orders = [None if bool((half == number).all()) else half.argsort() for half in found]
        return cls(orders[0], orders[1], page_size, head_size)

    def gather(self, cache: Tensor, table: Tensor, length: int) -> Context:
        """The keys and values of a request's first `length` tokens, unpacked copies."""
        own = table[: -(-length // self.page_size)].long()
        half = self.page_size * self.head_size
        raw = cache[own].reshape(len(own), -1, 2 * half)  # [pages, Hkv, 2 * size * D]

        def unpack(part: Tensor, order: Tensor | None) -> Tensor:
            plain = part if order is None else part.index_select(-1, order)
            tokens = plain.view(*plain.shape[:2], self.page_size, self.head_size)
            return tokens.transpose(0, 1).flatten(1, 2)[None, :, :length]

        key, value = raw[..., :half], raw[..., half:]
        return unpack(key, self.key_order), unpack(value, self.value_order)
