"""vLLM's FlashAttention backend with sparse attention for long rows: the backend CUSTOM on GPUs.

Decode, short rows and sliding windows run through the parent; a batch that holds long rows is
split, so that nothing is computed twice.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from minference.integrations.vllm import launch
from minference.integrations.vllm.layers import SparseLayer
from minference.integrations.vllm.pages import PagedRequest, split_kv
from minference.integrations.vllm.prefill import serve_rows
from minference.integrations.vllm.rows import Row, batch_rows

_ROWS = "minference_rows"


class Backend(FlashAttentionBackend):
    """FlashAttention, with sparse prefill."""

    @staticmethod
    def get_name() -> str:
        """The name under which vLLM knows backends from outside."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        """Checks the options of the engine that is being built."""
        launch.options_of(get_current_vllm_config())
        return SparseFlashImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        """Keeps each batch's lengths on the host."""
        return Builder


class Builder(FlashAttentionMetadataBuilder):
    """The parent's metadata, with the batch's rows as plain integers: no device is waited for."""

    # mixed batches must not be captured: which rows are sparse is decided on the host
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: Any,  # noqa: ANN401
        fast_build: bool = False,
    ) -> FlashAttentionMetadata:
        """As the parent's."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        common = common_attn_metadata
        lengths = getattr(common, "seq_lens_cpu_upper_bound", None)
        if lengths is None:
            lengths = common.seq_lens.cpu()
        rows = batch_rows(common.query_start_loc_cpu.tolist(), lengths.tolist())
        setattr(metadata, _ROWS, rows)
        return metadata

    @staticmethod
    def use_cascade_attention(*args: Any, **kwargs: Any) -> bool:  # noqa: ANN401
        """Never: a batch's common prefix would be attended to outside the rows."""
        return False


class SparseFlashImpl(SparseLayer, FlashAttentionImpl):
    """One layer: long rows by the method, all others by FlashAttention."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Takes what vLLM gives its own implementation."""
        super().__init__(*args, **kwargs)
        self.runtime = launch.start(get_current_vllm_config())

    def window(self) -> int:
        """Keys that a query sees; -1 for all."""
        return -1 if self.sliding_window is None else self.sliding_window[0]

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
        attn_metadata: FlashAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """As the parent's forward: queries [T, H, D], result into `output`."""

        def stock(metadata: Any, query: Tensor, output: Tensor) -> Tensor:  # noqa: ANN401
            return super(SparseFlashImpl, self).forward(
                layer, query, key, value, kv_cache, metadata, output,
                output_scale, output_block_scale,
            )  # fmt: skip

        own = self.prefill(layer)
        if own is None or attn_metadata is None or not _plain(attn_metadata):
            return stock(attn_metadata, query, output)
        self.start_step()
        rows = rows_of(attn_metadata)

        def read(row: Row) -> PagedRequest:
            pages = split_kv(kv_cache, self.head_size, self.num_kv_heads)
            return PagedRequest(*pages, attn_metadata.block_table[row.number], row.context)

        def dense(rest: tuple[Row, ...], query: Tensor, part: Tensor) -> None:
            stock(sub_batch(attn_metadata, rest), query, part)

        if not serve_rows(own, rows, query, output, read=read, dense=dense):
            stock(attn_metadata, query, output)
        return output


def rows_of(metadata: FlashAttentionMetadata) -> tuple[Row, ...]:
    """The batch's rows; read from the device once a step where the stock builder made it."""
    rows = getattr(metadata, _ROWS, None)
    if rows is None:
        rows = batch_rows(metadata.query_start_loc.tolist(), metadata.seq_lens.tolist())
        setattr(metadata, _ROWS, rows)
    return rows


def sub_batch(metadata: FlashAttentionMetadata, rows: tuple[Row, ...]) -> FlashAttentionMetadata:
    """The metadata of a batch that holds these rows alone, in this order."""
    device = metadata.query_start_loc.device
    start, numbers = [0], [row.number for row in rows]
    for row in rows:
        start.append(start[-1] + row.queries)
    chosen = torch.tensor(numbers, device=device)
    return dataclasses.replace(
        metadata,
        num_actual_tokens=start[-1],
        max_query_len=max(row.queries for row in rows),
        query_start_loc=torch.tensor(start, dtype=torch.int32, device=device),
        max_seq_len=max(row.context for row in rows),
        seq_lens=metadata.seq_lens[chosen],
        block_table=metadata.block_table[chosen],
        # made for the whole batch; the kernel plans for itself without it
        scheduler_metadata=None,
    )


def _plain(metadata: FlashAttentionMetadata) -> bool:
    # the second is the first's name up to vLLM 0.26
    special = ("mm_prefix_query_range_tensor", "mm_prefix_range_tensor", "rswa_prefix_lens")
    return metadata.causal is True and all(getattr(metadata, x, None) is None for x in special)
