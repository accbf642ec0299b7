"""`sparse_attention`: attention over the keys that a `SparseIndex` names, by any implementation."""

from typing import Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor

from minference.index import SparseIndex
from minference.ops._dispatch import resolve_impl
from minference.ops.attention.fp8 import check_precision, product_dtype
from minference.ops.checks import check_qkv, check_sinks, score_factor


@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: SparseIndex,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    return_lse: Literal[False] = False,
    precision: str = "native",
    impl: str = "auto",
) -> Tensor: ...
@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: SparseIndex,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    return_lse: Literal[True],
    precision: str = "native",
    impl: str = "auto",
) -> tuple[Tensor, Tensor]: ...
def sparse_attention(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N D"],
    index: SparseIndex,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Float[Tensor, " H"] | None = None,
    return_lse: bool = False,
    precision: str = "native",
    impl: str = "auto",
) -> Tensor | tuple[Float[Tensor, "B H L D"], Float[Tensor, "B H L"]]:
    """Causal attention of each query to the keys that `index` gives it.

    The last query sits at the last key: row r of the buffers is position N - L + r. Query head h
    reads KV head `h * Hkv // H`; K and V are never repeated. Padding rows give 0. Where the index
    has samples, these stand for the keys that it leaves out.

    Args:
        q: queries, fp16, bf16 or fp32; N >= L.
        k: keys, same dtype and device. Strides are free; kernels that need adjacent elements of a
            head copy others.
        v: values, like k.
        index: built for H or Hkv heads and these lengths.
        scale: factor of the scores, above 0; D ** -0.5 unless given.
        softcap: scores become softcap * tanh(score / softcap); 0 turns it off.
        sinks: a logit a head that takes part in the softmax without a value (gpt-oss).
        return_lse: also return the log-sum-exp of each row's scaled scores, float32, natural
            logarithm, samples and sinks included.
        precision: "native", the dtype of q; or "fp8": q, k and v rounded to e4m3 with a scale a
            head, the softmax and the sums in float32. Everything but q, k and v stays the same;
            samples are read as they are.
        impl: "auto", "reference", "torch", "triton" or "hopper".

    Returns:
        [B, H, L, D] in q's dtype, and the log-sum-exp [B, H, L] when asked for.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit one another, an unknown precision, a
            scale or a soft cap that is none.
        UnsupportedError: an explicit impl that cannot serve the call; fp8 on a GPU without it.
    """
    check_qkv(q, k, v)
    check_index(q, k, index)
    check_sinks(q, sinks)
    check_precision(precision)
    fp8 = precision == "fp8"
    name = resolve_impl(impl, q.device, product_dtype(precision, q.dtype), q.shape[-1])
    scale = score_factor(q, scale, softcap)
    need_lse = return_lse or sinks is not None
    out, lse = torch.ops.minference.sparse_attention(
        q, k, v, index.tensors(), index.q_len, index.kv_len, scale, softcap, need_lse, name, fp8,
        index.samples, index.sample_share,
    )  # fmt: skip
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    return (out, lse) if return_lse else out


def even_head_dims(*tensors: Tensor) -> list[Tensor]:
    """The tensors with the widest's head dim, zeros in the rest: scores stay, if their scale is
    given, and so do outputs in the first places."""
    widest = max(x.shape[-1] for x in tensors)
    return [
        x if x.shape[-1] == widest else torch.nn.functional.pad(x, (0, widest - x.shape[-1]))
        for x in tensors
    ]


def with_sinks(
    out: Float[Tensor, "B H L D"], lse: Float[Tensor, "B H L"], sinks: Float[Tensor, " H"]
) -> tuple[Float[Tensor, "B H L D"], Float[Tensor, "B H L"]]:
    """Output and log-sum-exp once each head's sink logit takes part in the softmax."""
    sink = sinks.to(lse.dtype)[:, None]
    # a row without a key stays 0, whatever the sink
    share = torch.sigmoid(lse - sink).masked_fill(lse == -torch.inf, 0)
    return out * share[..., None].to(out.dtype), torch.logaddexp(lse, sink)


def check_index(q: Tensor, k: Tensor, index: SparseIndex) -> None:
    """Raise ValueError unless `index` was built for such tensors, TypeError if it is none."""
    if not isinstance(index, SparseIndex):
        raise TypeError(
            f"index must be a SparseIndex, as a method's build_index gives, got "
            f"{type(index).__name__}; dense_attention needs none"
        )
    expected = (q.shape[0], q.shape[2], k.shape[2])
    got = (index.batch, index.q_len, index.kv_len)
    if expected != got:
        raise ValueError(
            f"index must be built for batch {expected[0]}, {expected[1]} queries and "
            f"{expected[2]} keys, got {got[0]}, {got[1]} and {got[2]}; build it from this q and k"
        )
    if index.heads not in (q.shape[1], k.shape[1]):
        raise ValueError(
            f"index must have {q.shape[1]} query heads or {k.shape[1]} KV heads, got "
            f"{index.heads}; build it from this q and k"
        )
    if index.device != q.device:
        raise ValueError(
            f"index must be on {q.device} like q, got {index.device}; move one of them"
        )


@torch.library.custom_op("minference::sparse_attention", mutates_args=())
def _sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: list[Tensor],
    q_len: int,
    kv_len: int,
    scale: float,
    softcap: float,
    need_lse: bool,
    impl: str,
    fp8: bool = False,
    samples: int = 0,
    sample_share: float = 1.0,
) -> tuple[Tensor, Tensor]:
    index = SparseIndex.from_tensors(lists, q_len, kv_len, samples, sample_share)
    own_lse = need_lse or samples > 0
    match impl:
        case "reference":
            from minference.ops.attention import reference

            out, lse = reference.sparse_attention(
                q, k, v, index, scale=scale, softcap=softcap, fp8=fp8
            )
        case "torch":
            from minference.ops.attention import torch_cpu

            out, lse = torch_cpu.sparse_attention(
                q, k, v, index, scale=scale, softcap=softcap, return_lse=own_lse, fp8=fp8
            )
        case "triton":
            from minference.ops.attention import triton

            out, lse = triton.sparse_attention(
                q, k, v, index, scale=scale, softcap=softcap, return_lse=own_lse, fp8=fp8
            )
        case _:
            from minference.ops.attention import hopper

            out, lse = hopper.sparse_attention(
                q, k, v, index, scale=scale, softcap=softcap, return_lse=own_lse, fp8=fp8
            )
    if samples and lse is not None:
        if impl in ("reference", "torch"):
            from minference.ops.attention.samples import join_samples
        else:
            from minference.ops.attention.triton_samples import join_samples
        out, lse = join_samples(q, k, v, index, out, lse, scale=scale, softcap=softcap)
    return out, q.new_empty(0, dtype=torch.float32) if lse is None or not need_lse else lse


@_sparse_attention.register_fake
def _(  # noqa: ANN202
    q, k, v, lists, q_len, kv_len, scale, softcap, need_lse, impl, fp8=False, samples=0,  # noqa: ANN001
    sample_share=1.0,  # noqa: ANN001
):  # fmt: skip
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[:3] if need_lse else (0,), dtype=torch.float32)
