"""vLLM's CPU backend with sparse attention for long rows.

Pages keep the stock layout: decode, short rows, sliding windows and cached prefixes run through
vLLM's own kernel, and an engine that is already running can be attached to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
)

from minference.integrations.vllm import launch
from minference.integrations.vllm.layers import SparseLayer
from minference.integrations.vllm.pages import PackedPages, PackedRequest
from minference.integrations.vllm.prefill import serve_rows
from minference.integrations.vllm.rows import Row, batch_rows


class Backend(CPUAttentionBackend):
    """The stock backend, except where the configuration asks for sparse prefill."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """Checks the options of the engine that is being built."""
        asked = launch.options_of(get_current_vllm_config()) is not None
        return SparseCPUImpl if asked else CPUAttentionBackendImpl


class SparseCPUImpl(SparseLayer, CPUAttentionBackendImpl):
    """One layer: long rows by the method, all others by vLLM's kernel."""

    _pages: PackedPages | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Takes what vLLM gives its own implementation."""
        super().__init__(*args, **kwargs)
        self.runtime = launch.start(get_current_vllm_config())

    def window(self) -> int:
        """Keys that a query sees; -1 for all."""
        return self.sliding_window

    def softcap(self) -> float:
        """Bound of the scores; 0 for none."""
        return float(self.logits_soft_cap)

    def forward(
        self,
        layer: Any,  # noqa: ANN401
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """As the stock forward: queries [T, H, D], result into `output`."""

        def stock() -> Tensor:
            return super(SparseCPUImpl, self).forward(
                layer, query, key, value, kv_cache, attn_metadata, output,
                output_scale, output_block_scale,
            )  # fmt: skip

        own = self.prefill(layer)
        if own is None or attn_metadata is None or not _plain(attn_metadata):
            return stock()
        self.start_step()
        rows = batch_rows(attn_metadata.query_start_loc.tolist(), attn_metadata.seq_lens.tolist())

        def read(row: Row) -> PackedRequest:
            pages = self._pages_of(layer, kv_cache)
            table = attn_metadata.block_table[row.number]
            return PackedRequest(pages, kv_cache, table, row.context)

        def dense(rest: tuple[Row, ...], query: Tensor, part: Tensor) -> None:
            own = self._sub_batch(layer, rest, attn_metadata)
            none = query.new_empty(0)
            super(SparseCPUImpl, self).forward(layer, query, none, none, kv_cache, own, part)

        if serve_rows(own, rows, query, output, read=read, dense=dense):
            return output
        return stock()

    def _sub_batch(
        self,
        layer: Any,  # noqa: ANN401
        rows: tuple[Row, ...],
        metadata: CPUAttentionMetadata,
    ) -> CPUAttentionMetadata:
        """The metadata of a batch that holds these rows alone, in this order."""
        numbers = torch.tensor([row.number for row in rows])
        lengths = torch.tensor([0, *(row.queries for row in rows)], dtype=torch.int32)
        start = lengths.cumsum(0, dtype=torch.int32)
        seq_lens = metadata.seq_lens[numbers]
        schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(rows),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_size,
            seq_lens=seq_lens,
            dtype=layer.kv_cache_torch_dtype,
            query_start_loc=start,
            causal=True,
            sliding_window_size=-1,
            isa=layer.isa,
            enable_kv_split=False,
            dynamic_causal=None,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        return CPUAttentionMetadata(
            num_actual_tokens=int(start[-1]),
            max_query_len=max(row.queries for row in rows),
            query_start_loc=start,
            max_seq_len=max(row.context for row in rows),
            seq_lens=seq_lens,
            block_table=metadata.block_table[numbers],
            slot_mapping=metadata.slot_mapping,
            scheduler_metadata=schedule,
        )

    def _pages_of(self, layer: Any, kv_cache: Tensor) -> PackedPages:  # noqa: ANN401
        if self._pages is None:
            size = kv_cache.shape[2]

            def write(page: Tensor, values: Tensor) -> None:
                slots = torch.arange(size)
                CPUAttentionBackendImpl.do_kv_cache_update(self, layer, values, values, page, slots)

            self._pages = PackedPages.probe(write, size, self.head_size, kv_cache.dtype)
        return self._pages


def _plain(metadata: CPUAttentionMetadata) -> bool:
    return metadata.causal is True and metadata.dynamic_causal is None
