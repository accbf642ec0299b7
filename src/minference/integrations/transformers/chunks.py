"""Long-prompt mode: token-wise work of one model over a few tokens at a time, with an undo.

Norms, MLPs and the rotary application need several times their result as scratch. Linear
projections need none beyond their result, so they stay whole.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from minference.integrations.transformers import _compat

Undo = Callable[[], None]


def chunk_token_wise(model: nn.Module, tokens: int, *, fuse: bool = False) -> list[Undo]:
    """Wraps the norms, MLPs and the rotary application of a model.

    Args:
        model: of which modules are wrapped.
        tokens: of a chunk.
        fuse: whether torch.compile makes the work on whole chunks; what is left runs as it is.

    Returns:
        Functions that undo the wrapping.

    Raises:
        ValueError: fewer than one token.
    """
    if tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {tokens}")
    undo = []
    for module in model.modules():
        for name in ("mlp", "feed_forward"):
            mlp = getattr(module, name, None)
            if isinstance(mlp, nn.Module):
                undo.append(_wrap(mlp, _chunked_mlp(mlp.forward, _fused(mlp, fuse), tokens)))
        if type(module).__name__.endswith(("RMSNorm", "LayerNorm")):
            norm = _chunked_norm(module.forward, _fused_norm(module, fuse), tokens)
            undo.append(_wrap(module, norm))
        forward = _compat.with_rotary(
            module,
            lambda plain: _chunked_rotary(plain, _compiled(plain) if fuse else plain, tokens),
        )
        if forward is not None:
            undo.append(_wrap(module, forward))
    return undo


def _wrap(module: nn.Module, forward: Callable[..., Any]) -> Undo:
    own = module.__dict__.get("forward")

    def undo() -> None:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = own

    module.forward = forward
    return undo


@cache
def _compiled(plain: Callable[..., Any]) -> Callable[..., Any]:
    """One compiled function for all modules of a class: their weights are arguments of it."""
    return torch.compile(plain)


def _fused(module: nn.Module, fuse: bool) -> Callable[..., Any]:
    """A module's forward, compiled if asked for and if no other library holds it already."""
    if not fuse or "forward" in module.__dict__:
        return module.forward
    return partial(_compiled(type(module).forward), module)


@cache
def _into(forward: Callable[..., Tensor]) -> Callable[..., None]:
    def write(module: nn.Module, x: Tensor, out: Tensor) -> None:
        out.copy_(forward(module, x))

    return write


def _fused_norm(module: nn.Module, fuse: bool) -> Callable[[Tensor, Tensor], None] | None:
    """The compiled norm, which writes into its second argument without a copy."""
    if not fuse or "forward" in module.__dict__:
        return None
    return partial(_compiled(_into(type(module).forward)), module)


def _chunk(x: Tensor, dim: int, begin: int, size: int) -> Tensor:
    """Part of a tensor; of one row without the whole length in its strides, to which compiled work
    would be bound."""
    part = x.narrow(dim, begin, size)
    return part.squeeze(0).unsqueeze(0) if dim and part.shape[0] == 1 else part


def _in_chunks(
    plain: Callable[[Tensor], Tensor],
    fused: Callable[[Tensor], Tensor],
    x: Tensor,
    dim: int,
    tokens: int,
) -> Tensor:
    """The parts of a result over `dim`, which some experts hand back without the dimensions before
    it."""
    out, at = None, dim
    for begin in range(0, x.shape[dim], tokens):
        size = min(tokens, x.shape[dim] - begin)
        part = (fused if size == tokens else plain)(_chunk(x, dim, begin, size))
        if out is None:
            at = dim - x.dim() + part.dim()
            shape = list(part.shape)
            shape[at] = x.shape[dim]
            out = part.new_empty(shape)
        out.narrow(at, begin, size).copy_(part)
    return plain(x) if out is None else out


def _stays_whole() -> bool:
    """Whether work is not cut: a backward pass needs it all, and a compiler fuses it."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def _chunked_mlp(
    plain: Callable[..., Any], fused: Callable[..., Any], tokens: int
) -> Callable[..., Any]:
    def forward(x: Tensor, *args: object, **kwargs: object) -> Any:  # noqa: ANN401
        if _stays_whole() or x.dim() != 3 or x.shape[1] <= tokens or args or kwargs:
            return plain(x, *args, **kwargs)
        if x.shape[0] > 1:
            # experts see flattened tokens, which are in order for one row only
            rows = [forward(row) for row in x.split(1)]
            if isinstance(rows[0], tuple):
                return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))
            return torch.cat(rows)
        rest: list[Any] = []

        def first(forward: Callable[..., Any], part: Tensor) -> Tensor:
            got = forward(part)
            if isinstance(got, tuple):
                rest.append(got[1:])
                return got[0]
            return got

        out = _in_chunks(partial(first, plain), partial(first, fused), x, 1, tokens)
        # what a router says of each token
        more = (torch.cat(parts, dim=parts[0].dim() - 2) for parts in zip(*rest, strict=True))
        return (out, *more) if rest else out

    return forward


def _chunked_norm(
    plain: Callable[..., Tensor], fused: Callable[[Tensor, Tensor], None] | None, tokens: int
) -> Callable[..., Tensor]:
    def forward(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        if _stays_whole():
            return plain(x, *args, **kwargs)
        # a norm looks at the last dimension alone: any other may be cut, the tokens are the longest
        dim = max(range(x.dim() - 1), key=lambda d: x.shape[d], default=0)
        if x.dim() < 3 or x.shape[dim] <= tokens or args or kwargs:
            return plain(x, *args, **kwargs)
        # one token tells the type, and whether the width stays
        token = plain(x.narrow(dim, 0, 1))
        if token.shape[-1] != x.shape[-1]:
            return plain(x)
        out = token.new_empty(x.shape)
        for begin in range(0, x.shape[dim], tokens):
            size = min(tokens, x.shape[dim] - begin)
            part, own = (_chunk(y, dim, begin, size) for y in (x, out))
            if fused is None or size < tokens:
                own.copy_(plain(part))
            else:
                fused(part, own)
        return out

    return forward


def _chunked_rotary(
    plain: Callable[..., Any], fused: Callable[..., Any], tokens: int
) -> Callable[..., Any]:
    """Rotates in place: q and k are fresh from their projections or norms, and not used again."""

    def rotary(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        # some models rotate one tensor a call
        if _stays_whole() or len(args) != 4 or kwargs:
            return plain(*args, **kwargs)
        q, k, cos, sin = args
        length = q.shape[2] if q.dim() == 4 else 0
        fits = cos.dim() == 3 and cos.shape[1] == sin.shape[1] == k.shape[2] == length
        if not fits or length <= tokens:
            return plain(q, k, cos, sin)
        for begin in range(0, length, tokens):
            size = min(tokens, length - begin)
            turn = fused if size == tokens else plain
            parts = [_chunk(x, 2, begin, size) for x in (q, k)]
            angles = [_chunk(x, 1, begin, size) for x in (cos, sin)]
            for part, turned in zip(parts, turn(*parts, *angles), strict=True):
                part.copy_(turned)
        return q, k

    return rotary
