"""`paged_sparse_attention`: attention over an index, keys and values read from a server's pages."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minference.errors import UnsupportedError
from minference.index import SparseIndex
from minference.ops._dispatch import resolve_impl, why_not_triton
from minference.ops.attention.api import check_index, with_sinks
from minference.ops.checks import DTYPES, check_sinks, score_factor

MIN_PAGE = 16


def paged_sparse_attention(
    q: Float[Tensor, "B H L D"],
    k_cache: Float[Tensor, "pages size Hkv D"],
    v_cache: Float[Tensor, "pages size Hkv D"],
    block_table: Int[Tensor, "B width"],
    index: SparseIndex,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Float[Tensor, " H"] | None = None,
    impl: str = "auto",
) -> Float[Tensor, "B H L D"]:
    """As `sparse_attention`, for contexts of `index.kv_len` tokens that lie in pages.

    Token n of sequence b is row n % size of page `block_table[b, n // size]`. "triton" reads the
    pages where they are; "reference" and "torch" copy the contexts out first.

    Args:
        q: queries, fp16, bf16 or fp32.
        k_cache: keys; any strides whose last one is 1, so that views of a cache in any layout do.
        v_cache: values, like k_cache.
        block_table: int32, numbers of each sequence's pages; entries past a context are not read.
        index: built for these queries and for contexts of `index.kv_len` tokens.
        scale: as for `sparse_attention`, like the next two.
        softcap: bound of the scores.
        sinks: a logit a head.
        impl: "auto" (Triton where it runs on a GPU, else torch), "reference", "torch" or "triton".

    Raises:
        ValueError: shapes, dtypes or devices that do not fit one another, a scale or a soft cap
            that is none.
        UnsupportedError: an explicit impl that cannot serve the call.
    """
    _check(q, k_cache, v_cache, block_table, index)
    check_sinks(q, sinks)
    factor = score_factor(q, scale, softcap)
    out, lse = torch.ops.minference.paged_sparse_attention(
        q, k_cache, v_cache, block_table, index.tensors(), index.kv_len, factor, softcap,
        sinks is not None, _resolve(impl, q), index.samples, index.sample_share,
    )  # fmt: skip
    return out if sinks is None else with_sinks(out, lse, sinks)[0]


@torch.library.custom_op("minference::paged_sparse_attention", mutates_args=())
def _paged_sparse_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor,
    lists: list[Tensor],
    kv_len: int,
    scale: float,
    softcap: float,
    need_lse: bool,
    impl: str,
    samples: int = 0,
    sample_share: float = 1.0,
) -> tuple[Tensor, Tensor]:
    q_len = q.shape[2]
    if impl != "triton":
        k, v = (gather_pages(x, table, kv_len) for x in (k_cache, v_cache))
        contiguous = torch.ops.minference.sparse_attention
        return contiguous(
            q, k, v, lists, q_len, kv_len, scale, softcap, need_lse, impl, False, samples,
            sample_share,
        )  # fmt: skip
    from minference.ops.attention import triton

    index = SparseIndex.from_tensors(lists, q_len, kv_len, samples, sample_share)
    k, v = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    out, lse = triton.sparse_attention(
        q, k, v, index, scale=scale, softcap=softcap, return_lse=need_lse or samples > 0,
        table=table,
    )  # fmt: skip
    if samples and lse is not None:
        from minference.ops.attention.triton_samples import join_samples

        out, lse = join_samples(q, k, v, index, out, lse, scale=scale, softcap=softcap, table=table)
    return out, q.new_empty(0, dtype=torch.float32) if lse is None or not need_lse else lse


@_paged_sparse_attention.register_fake
def _(  # noqa: ANN202
    q, k_cache, v_cache, table, lists, kv_len, scale, softcap, need_lse, impl, samples=0,  # noqa: ANN001
    sample_share=1.0,  # noqa: ANN001
):  # fmt: skip
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[:3] if need_lse else (0,), dtype=torch.float32)


def gather_pages(
    pages: Float[Tensor, "pages size Hkv D"], table: Int[Tensor, "B width"], length: int
) -> Float[Tensor, "B Hkv length D"]:
    """Copies the first `length` tokens of each sequence out of its pages."""
    own = table[:, : -(-length // pages.shape[1])].long()
    return pages[own].flatten(1, 2)[:, :length].transpose(1, 2)


def _resolve(impl: str, q: Tensor) -> str:
    if impl == "hopper":
        raise UnsupportedError(
            "the Hopper kernel does not read pages; use impl='triton', or gather_pages and "
            "sparse_attention"
        )
    name = resolve_impl(impl, q.device, q.dtype, q.shape[-1])
    if name != "hopper":
        return name
    return "triton" if why_not_triton(q.device, q.dtype) is None else "torch"


def _check(q: Tensor, k: Tensor, v: Tensor, table: Tensor, index: SparseIndex) -> None:
    if q.ndim != 4 or q.dtype not in DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ValueError(
            f"q must be [batch, heads, length, head_dim] of dtype {allowed}, got {list(q.shape)} "
            f"of {q.dtype}"
        )
    fit = k.shape == v.shape and k.ndim == 4 and k.shape[3] == q.shape[3]
    if not fit or k.shape[2] == 0 or q.shape[1] % k.shape[2]:
        raise ValueError(
            f"k_cache and v_cache must both be [pages, size, Hkv, {q.shape[3]}] with Hkv a divisor "
            f"of {q.shape[1]} heads, got {list(k.shape)} and {list(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device == table.device:
        raise ValueError(
            f"q, k_cache, v_cache and block_table must share a device, and all but the table a "
            f"dtype, got {q.dtype}, {k.dtype}, {v.dtype} on {q.device}, {k.device}, {v.device}, "
            f"{table.device}; a quantised cache is not served"
        )
    if k.stride(3) != 1 or v.stride(3) != 1:
        raise ValueError("elements of a head must be adjacent in k_cache and v_cache")
    if k.shape[1] < MIN_PAGE:
        raise ValueError(f"pages must hold at least {MIN_PAGE} tokens, got {k.shape[1]}")
    needed = -(-index.kv_len // k.shape[1])
    fits = table.ndim == 2 and table.shape[0] == q.shape[0] and table.shape[1] >= needed
    if table.dtype != torch.int32 or not fits or table.stride(-1) != 1:
        raise ValueError(
            f"block_table must be int32 [{q.shape[0]}, at least {needed}] with adjacent entries, "
            f"got {table.dtype} {list(table.shape)}"
        )
    if table.device.type == "cpu":
        own = table[:, :needed]
        if bool(((own < 0) | (own >= k.shape[0])).any()):
            raise ValueError(f"block_table names pages outside 0 .. {k.shape[0] - 1}")
    check_index(q, k.new_empty(0).expand(q.shape[0], k.shape[2], index.kv_len, 0), index)
