"""Read one request's keys and values out of vLLM's pages, whatever their layout.

The layout changed three times between vLLM 0.20 and 0.33, and CPU kernels pack keys in an order
of their own, so nothing here indexes a cache by an assumed shape.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minference.errors import UnsupportedError
from minference.index import SparseIndex
from minference.ops._dispatch import resolve_impl
from minference.ops.attention.api import sparse_attention
from minference.ops.attention.paged import gather_pages, paged_sparse_attention


class Request(ABC):
    """One request's context in one layer's pages. Copies are made of a few heads at a time."""

    @property
    @abstractmethod
    def kv_heads(self) -> int:
        """KV heads of the pages."""

    @property
    @abstractmethod
    def head_bytes(self) -> int:
        """Bytes of one head's keys and values over the whole context."""

    @abstractmethod
    def keys(self, heads: slice) -> Tensor:
        """A copy of these heads' keys, [1, heads, N, D]."""

    @abstractmethod
    def values(self, heads: slice) -> Tensor:
        """A copy of these heads' values, [1, heads, N, D]."""

    def attend(
        self,
        q: Tensor,
        key: Tensor,
        heads: slice,
        index: SparseIndex,
        **options: Any,  # noqa: ANN401
    ) -> Tensor:
        """Sparse attention over these heads.

        Args:
            q: queries [1, H, L, D] of these KV heads.
            key: their keys, as `keys` gave them.
            heads: the KV heads.
            index: built for q and key.
            **options: scale, softcap, sinks and impl of `sparse_attention`.
        """
        return sparse_attention(q, key, self.values(heads), index, **options)

    def parts(self, workspace: int) -> list[slice]:
        """The KV heads in equal parts whose copies fit `workspace` bytes; one head at least."""
        fits = max(1, workspace // max(1, self.head_bytes))
        size = max(n for n in range(1, self.kv_heads + 1) if self.kv_heads % n == 0 and n <= fits)
        return [slice(a, a + size) for a in range(0, self.kv_heads, size)]


@dataclass(frozen=True, eq=False)
class PagedRequest(Request):
    """A request in a GPU's pages. Triton reads keys and values in place; the Hopper kernel, where
    it serves the call, gets copies of both.

    Attributes:
        key_pages: keys [pages, page_size, Hkv, D], any strides.
        value_pages: values, likewise.
        table: numbers of the request's pages, in order.
        length: tokens of the context.
    """

    key_pages: Tensor
    value_pages: Tensor
    table: Tensor
    length: int

    @property
    def kv_heads(self) -> int:
        return self.key_pages.shape[2]

    @property
    def head_bytes(self) -> int:
        return 2 * self.length * self.key_pages.shape[3] * self.key_pages.element_size()

    def keys(self, heads: slice) -> Tensor:
        return gather_pages(self.key_pages[:, :, heads], self.table[None], self.length)

    def values(self, heads: slice) -> Tensor:
        return gather_pages(self.value_pages[:, :, heads], self.table[None], self.length)

    def attend(
        self,
        q: Tensor,
        key: Tensor,
        heads: slice,
        index: SparseIndex,
        **options: Any,  # noqa: ANN401
    ) -> Tensor:
        if resolve_impl(options["impl"], q.device, q.dtype, q.shape[-1]) != "triton":
            return super().attend(q, key, heads, index, **options)
        pages = self.key_pages[:, :, heads], self.value_pages[:, :, heads]
        return paged_sparse_attention(q, *pages, self.table[None], index, **options)


def split_kv(cache: Tensor, head_size: int, kv_heads: int) -> tuple[Tensor, Tensor]:
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


@dataclass(frozen=True, eq=False)
class PackedRequest(Request):
    """A request in the pages of vLLM's CPU kernels.

    Attributes:
        pages: how keys and values lie in a page.
        cache: the layer's pages.
        table: numbers of the request's pages, in order.
        length: tokens of the context.
    """

    pages: PackedPages
    cache: Tensor
    table: Tensor
    length: int

    @property
    def kv_heads(self) -> int:
        return self.cache.shape[1]

    @property
    def head_bytes(self) -> int:
        return self.length * self.cache.shape[3] * self.cache.element_size()

    def keys(self, heads: slice) -> Tensor:
        return self._unpacked(heads, 0, self.pages.key_order)

    def values(self, heads: slice) -> Tensor:
        return self._unpacked(heads, 1, self.pages.value_order)

    def _unpacked(self, heads: slice, half: int, order: Tensor | None) -> Tensor:
        size, dim = self.pages.page_size, self.pages.head_size
        own = self.table[: -(-self.length // size)].long()
        part = self.cache.view(*self.cache.shape[:2], 2, size * dim)[:, heads, half][own]
        plain = part if order is None else part.index_select(-1, order)
        tokens = plain.view(*plain.shape[:2], size, dim).transpose(0, 1)
        return tokens.flatten(1, 2)[None, :, : self.length]
