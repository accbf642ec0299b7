"""Dense attention with everything that models ask for: the best fused kernel where one fits, on a
GPU the sparse kernels with every key in the index, else blocks of rows with a mask written out.
Causal at the bottom right: the last query sits at the last key."""

import importlib
import importlib.util
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention

from minference.errors import UnsupportedError
from minference.index import TILE, real_bounds
from minference.ops._dispatch import resolve_impl
from minference.ops._triton import capability
from minference.ops.attention.api import sparse_attention
from minference.ops.attention.fp8 import check_precision
from minference.ops.build import Layout, dense_index
from minference.ops.checks import check_rows, check_sinks, check_sizes, score_factor
from minference.ops.scores import softcapped

HALVES = (torch.float16, torch.bfloat16)
ROWS = 1024
"""Rows of a block where a mask must be written out: ROWS x keys, never keys x keys."""
FLASH3_NAMES = ("flash_attn_interface", "fa3_fwd_interface")
"""Modules of FlashAttention 3 with the same function: built from source, and from wheels."""
FLASH3 = next((name for name in FLASH3_NAMES if importlib.util.find_spec(name)), None)
"""The one that is installed."""
ENOUGH_TILES = 105
"""Tiles of all heads that occupy four fifths of an H100: with fewer FlashAttention 3 shares out
the keys of a tile too, which costs a pass."""
FASTEST = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
PLANNED = 1 << 33
"""Scores of all heads, 16K tokens of 32 heads, from which cuDNN is worth the 40 to 70 ms in which
it plans for a length that it has not seen: torch's own choice on Hopper takes them at every length,
and so for every token that is decoded."""
PLANNED_MASK = 1 << 29
"""The same with a written mask, which torch's other kernels take longer for: 4K tokens."""


def dense_attention(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N E"],
    *,
    keep: Bool[Tensor, "B N"] | None = None,
    mask: Bool[Tensor, "B h L N"] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Float[Tensor, " H"] | None = None,
    dropout: float = 0.0,
    precision: str = "native",
    holes: bool | None = None,
) -> Float[Tensor, "B H L E"]:
    """Attention to every key that a mask allows.

    Args:
        q: queries.
        k: keys, never repeated for a fused kernel that serves groups.
        v: values.
        keep: which keys are real, under the causal mask; every one unless given.
        mask: which keys each query sees, in place of `keep` and the causal mask.
        scale: factor of the scores; D ** -0.5 unless given.
        softcap: scores become softcap * tanh(score / softcap); 0 turns it off.
        sinks: a logit a head that takes part in the softmax without a value.
        dropout: probability of dropping a weight.
        precision: "native", or "fp8" as in `sparse_attention`, whose kernel then serves: causal,
            with `keep` at one end or both, without `mask` and dropout.
        holes: whether `keep` has any, where the caller knows: to look waits for the device.

    Returns:
        [B, H, L, E] in q's dtype; a row that sees no key is 0.

    Raises:
        ValueError: shapes that do not fit one another, a scale or a soft cap that is none, sinks
            that are not one a head.
        UnsupportedError: fp8 where it cannot be had, with a mask or dropout, or with values wider
            than keys.
    """
    check_sizes(q, k)
    _check_others(q, k, v, keep, mask)
    factor = score_factor(q, scale, softcap)
    check_precision(precision)
    check_sinks(q, sinks)
    if precision == "fp8":
        if mask is not None or dropout:
            raise UnsupportedError(
                "precision='fp8' serves causal attention with `keep`, without `mask` and dropout; "
                "use precision='native'"
            )
        if v.shape[-1] > k.shape[-1]:
            raise UnsupportedError(
                f"precision='fp8' needs values no wider than keys, got {v.shape[-1]} for "
                f"{k.shape[-1]}; use precision='native'"
            )
        if not _whole(keep, holes):
            raise UnsupportedError(
                "precision='fp8' needs the real keys in one run, got a `keep` with holes; pad at "
                "one end, or use precision='native'"
            )
        return _by_index(q, k, v, keep, factor, softcap, sinks, precision)
    if mask is None and keep is None and not softcap and sinks is None:
        out = _fused(q, k, v, factor, dropout)
        if out is not None:
            return out
    if mask is None and not dropout and _sparse_kernel_serves(q, k, v) and _whole(keep, holes):
        return _by_index(q, k, v, keep, factor, softcap, sinks, precision)
    exact = softcap or sinks is not None or _few(q, k, v)
    if not exact:
        k, v = _groups(q, k), _groups(q, v)
    out = []
    for begin in range(0, q.shape[2], ROWS):
        rows = slice(begin, min(begin + ROWS, q.shape[2]))
        stop = k.shape[2] if mask is not None else k.shape[2] - q.shape[2] + rows.stop
        own = _rows_mask(q, k, keep, mask, rows, stop)
        block = (q[:, :, rows], k[:, :, :stop], v[:, :, :stop])
        if exact:
            out.append(_exact(*block, own, factor, softcap, sinks, dropout))
        else:
            out.append(_masked(*block, own, factor, dropout))
    return torch.cat(out, dim=2) if len(out) > 1 else out[0]


def _check_others(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, mask: Tensor | None
) -> None:
    """Raise ValueError unless values and masks belong to the queries and keys."""
    batch, heads, rows, _ = q.shape
    keys = k.shape[2]
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must have k's {list(k.shape[:3])} rows, got {list(v.shape[:3])}")
    if keep is not None and keep.shape != (batch, keys):
        raise ValueError(f"keep must have shape {[batch, keys]}, got {list(keep.shape)}")
    if mask is None:
        check_rows(q, k)
        return
    own = list(mask.shape)
    if own not in ([b, h, rows, keys] for b in (1, batch) for h in (1, heads)):
        raise ValueError(
            f"mask must have shape {[batch, heads, rows, keys]}, or 1 for all batch rows or heads, "
            f"got {own}"
        )


def has_holes(keep: Bool[Tensor, "B N"]) -> bool:
    """Whether the real keys of some batch row are not one run; waits for the device."""
    return bool(((keep[:, 1:] & ~keep[:, :-1]).sum(dim=1) + keep[:, 0] > 1).any())


def _whole(keep: Tensor | None, holes: bool | None) -> bool:
    return keep is None or not (has_holes(keep) if holes is None else holes)


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float) -> Tensor | None:
    """By a fused kernel; None where none has the causal mask of fewer queries than keys."""
    rows = q.shape[2]
    if rows > 1 and not dropout and _flash3_serves(q, k, v):
        return flash3(q, k, v, scale=scale)
    left_to_torch = rows == 1 and not _may_plan(q)
    if q.is_cuda and rows < k.shape[2] and not left_to_torch:
        params = SDPAParams(q, k, v, None, dropout, False, q.shape[1] != k.shape[1])
        if can_use_flash_attention(params):
            return flash2(q, k, v, scale=scale, dropout=dropout)
    if rows not in (1, k.shape[2]):
        return None
    if q.is_cuda and q.dtype == torch.float32:
        # no fused kernel serves groups in single precision, and the rest build all L x N scores
        k, v = _groups(q, k), _groups(q, v)
    backends = () if left_to_torch else _backends(q, k, PLANNED)
    return sdpa(q, k, v, backends, scale=scale, causal=rows > 1, dropout=dropout)


def _may_plan(q: Tensor) -> bool:
    """Whether torch's own choice may be cuDNN: on Hopper and the first Blackwells."""
    return q.is_cuda and capability(q.device)[0] in (9, 10)


def _backends(q: Tensor, k: Tensor, planned: int) -> Sequence[SDPBackend]:
    """The kernels of torch to try, in half precision on a GPU; elsewhere torch chooses."""
    if not q.is_cuda or q.dtype not in HALVES:
        return ()
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    return FASTEST if scores >= planned else FASTEST[1:]


def _sparse_kernel_serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    # an index takes longer than the masks of few rows
    return (
        _in_half_without_gradients(q, k, v)
        and q.shape[2] > TILE
        and v.shape[-1] <= q.shape[-1]
        and resolve_impl("auto", q.device, q.dtype, q.shape[-1]) != "torch"
    )


def _by_index(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    precision: str,
) -> Tensor:
    first, stop = real_bounds(q.shape[0], k.shape[2], q.device, keep)
    index = dense_index(Layout(first, stop, q.shape[2], k.shape[2]), q.shape[1])
    width = v.shape[-1]
    v = pad(v, (0, k.shape[-1] - width))
    options = {"scale": scale, "softcap": softcap, "sinks": sinks, "precision": precision}
    return sparse_attention(q, k, v, index, **options)[..., :width]


def _rows_mask(
    q: Tensor, k: Tensor, keep: Tensor | None, mask: Tensor | None, rows: slice, stop: int
) -> Tensor:
    if mask is not None:
        return mask[:, :, rows, :stop]
    places = torch.arange(stop, device=q.device)
    seen = places <= (places[-1] - (rows.stop - rows.start) + 1) + torch.arange(
        rows.stop - rows.start, device=q.device
    ).unsqueeze(1)
    return seen[None, None] if keep is None else seen & keep[:, None, None, :stop]


def _groups(q: Tensor, x: Tensor) -> Tensor:
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _few(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a GPU multiplies the heads of a KV head by their keys at once, not repeated."""
    return q.shape[2] <= TILE and _in_half_without_gradients(q, k, v)


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, dropout: float) -> Tensor:
    backends = _backends(q, k, PLANNED_MASK)
    out = sdpa(q, k, v, backends, mask=mask, scale=scale, causal=False, dropout=dropout)
    return out.masked_fill(~mask.any(dim=-1, keepdim=True), 0)


def _exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    groups, half = (q.shape[0], k.shape[1], -1), _in_half_without_gradients(q, k, v)
    heads = q.reshape(*groups, q.shape[3])
    if half:
        scores = torch.bmm(heads.flatten(0, 1), k.flatten(0, 1).mT, out_dtype=torch.float32)
    else:
        scores = heads.float() @ k.float().mT
    scores = softcapped(scores.view(*q.shape[:3], -1) * scale, softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(dim=-1)[..., : k.shape[2]].nan_to_num(0.0)
    weights = torch.nn.functional.dropout(weights, dropout) if dropout else weights
    weights = weights.reshape(*groups, k.shape[2])
    out = weights.to(v.dtype) @ v if half else weights @ v.float()
    return out.reshape(*q.shape[:3], -1).to(q.dtype)


def flash2(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Causal attention of as many queries as keys or fewer, by torch's FlashAttention 2 where it
    serves, else with a mask that is written out."""
    mask = causal_lower_right(q.shape[2], k.shape[2])
    return scaled_dot_product_attention(
        q, k, v, mask, dropout_p=dropout, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def flash3(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = True
) -> Tensor:
    """Attention by FlashAttention 3, which must be installed."""
    tiles = q.shape[0] * q.shape[1] * -(-q.shape[2] // TILE)
    out = importlib.import_module(FLASH3 or FLASH3_NAMES[0]).flash_attn_func(
        *(x.transpose(1, 2) for x in (q, k, v)),
        softmax_scale=scale,
        causal=causal,
        num_splits=1 if tiles >= ENOUGH_TILES else 0,
    )
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    backends: Sequence[SDPBackend],
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    dropout: float = 0.0,
) -> Tensor:
    """Attention by the first of these kernels that serves the call; torch chooses if none is
    named."""
    with sdpa_kernel(list(backends), set_priority=True) if backends else nullcontext():
        return scaled_dot_product_attention(
            q,
            k,
            v,
            mask,
            is_causal=causal,
            scale=scale,
            dropout_p=dropout,
            enable_gqa=q.shape[1] != k.shape[1],
        )


def _in_half_without_gradients(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """What kernels without a backward pass need, on a GPU."""
    return q.is_cuda and q.dtype in HALVES and not any(x.requires_grad for x in (q, k, v))


def _flash3_serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return (
        _in_half_without_gradients(q, k, v)
        and q.shape[-1] == v.shape[-1] <= 256
        and capability(q.device) == (9, 0)
        and FLASH3 is not None
    )
