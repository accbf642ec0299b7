"""The decoder in plain torch, with transformers' parameter names so that weights are just copied.

Token-wise parts are functions over all tokens of a step, whatever the context length: they are
compiled once and attention, the only part that sees rows, stays outside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import ModelShape

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Losses:
    """Sums over the tokens of a step, and the most likely token at each place."""

    text: Tensor
    answers: Tensor
    best: Tensor


class Needle(nn.Module):
    """Parameters and forward pass; activations are bf16 on a GPU and fp32 on a CPU."""

    def __init__(self, shape: ModelShape, *, compile_parts: bool = False) -> None:
        super().__init__()
        self.shape = shape
        self.repeat_kv = False
        self.table = nn.ParameterDict()
        for name, size in parameter_sizes(shape).items():
            self.table[name.replace(".", "/")] = nn.Parameter(_initial(name, size))
        wrap: Callable = torch.compile if compile_parts else lambda part: part
        self.before, self.after, self.score = (
            wrap(before_attention),
            wrap(after_attention),
            wrap(score),
        )

    def named(self) -> Weights:
        """Parameters by transformers' names."""
        return {name.replace("/", "."): value for name, value in self.table.items()}

    def forward(self, tokens: Tensor, targets: Tensor, text: Tensor, answers: Tensor) -> Losses:
        """Losses of next-token prediction.

        Args:
            tokens: [B, L], int64.
            targets: [B, L], int64.
            text: [B, L], float weight of each target in the text loss.
            answers: [B, L], float weight of each target in the answer loss.
        """
        rows, length = tokens.shape
        weights, shape = self.named(), self.shape
        kind = torch.bfloat16 if tokens.is_cuda else torch.float32
        x = F.embedding(tokens.reshape(-1), weights["model.embed_tokens.weight"]).to(kind)
        cos, sin = rotary(shape, rows, length, tokens.device, kind)
        for layer in range(shape.layers):
            own = _layer_weights(weights, layer)
            q, k, v = self.before(x, cos, sin, own, shape.head_dim, shape.norm_eps)
            mixed = attend(
                *(
                    part.view(rows, length, -1, shape.head_dim).transpose(1, 2)
                    for part in (q, k, v)
                ),
                repeat_kv=self.repeat_kv,
            )
            x = self.after(x, mixed.transpose(1, 2).reshape(x.shape[0], -1), own, shape.norm_eps)
        final, embedding = weights["model.norm.weight"], weights["model.embed_tokens.weight"]
        return Losses(
            *self.score(
                x,
                final,
                embedding,
                targets.reshape(-1),
                text.reshape(-1),
                answers.reshape(-1),
                shape.norm_eps,
            )
        )


def parameter_sizes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every parameter's size by transformers' name."""
    width, head, mlp = shape.width, shape.head_dim, shape.mlp
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, width)}
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        sizes |= {
            f"{at}.input_layernorm.weight": (width,),
            f"{at}.self_attn.q_proj.weight": (shape.heads * head, width),
            f"{at}.self_attn.k_proj.weight": (shape.kv_heads * head, width),
            f"{at}.self_attn.v_proj.weight": (shape.kv_heads * head, width),
            f"{at}.self_attn.o_proj.weight": (width, shape.heads * head),
            f"{at}.self_attn.q_norm.weight": (head,),
            f"{at}.self_attn.k_norm.weight": (head,),
            f"{at}.post_attention_layernorm.weight": (width,),
            f"{at}.mlp.gate_proj.weight": (mlp, width),
            f"{at}.mlp.up_proj.weight": (mlp, width),
            f"{at}.mlp.down_proj.weight": (width, mlp),
        }
    return sizes | {"model.norm.weight": (width,)}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis, computed in fp32."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * wide.to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, *, repeat_kv: bool) -> Tensor:
    """Causal attention, [B, H, L, D]; some kernels want the shared keys and values repeated."""
    if repeat_kv:
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not repeat_kv)


def before_attention(
    x: Tensor, cos: Tensor, sin: Tensor, own: Weights, head_dim: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of all tokens, [T, heads * head_dim] each, rotated."""
    x = rms_norm(x, own["input_layernorm"], eps)

    def project(name: str) -> Tensor:
        return F.linear(x, own[f"self_attn.{name}"].to(x.dtype)).view(x.shape[0], -1, head_dim)

    q = _rotate(rms_norm(project("q_proj"), own["self_attn.q_norm"], eps), cos, sin)
    k = _rotate(rms_norm(project("k_proj"), own["self_attn.k_norm"], eps), cos, sin)
    return q.flatten(1), k.flatten(1), project("v_proj").flatten(1)


def after_attention(x: Tensor, mixed: Tensor, own: Weights, eps: float) -> Tensor:
    """Output projection and the gated MLP, both added to the stream, [T, width]."""
    x = x + F.linear(mixed, own["self_attn.o_proj"].to(x.dtype))
    h = rms_norm(x, own["post_attention_layernorm"], eps)
    gate, up, down = (own[f"mlp.{name}_proj"].to(x.dtype) for name in ("gate", "up", "down"))
    return x + F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)


def score(
    x: Tensor,
    final: Tensor,
    embedding: Tensor,
    targets: Tensor,
    text: Tensor,
    answers: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed weighted losses over text and answers, and the most likely tokens, [T]."""
    logits = F.linear(rms_norm(x, final, eps), embedding.to(x.dtype)).float()
    loss = F.cross_entropy(logits, targets, reduction="none")
    return (loss * text).sum(), (loss * answers).sum(), logits.argmax(-1)


def rotary(
    shape: ModelShape, rows: int, length: int, device: torch.device, kind: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every token's position, [T, 1, head_dim], halves repeated."""
    steps = torch.arange(0, shape.head_dim, 2, device=device).float() / shape.head_dim
    angles = torch.arange(length, device=device).float()[:, None] / shape.rope_theta**steps
    angles = torch.cat((angles, angles), -1).repeat(rows, 1)[:, None]
    return angles.cos().to(kind), angles.sin().to(kind)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _layer_weights(weights: Weights, layer: int) -> Weights:
    prefix = f"model.layers.{layer}."
    return {
        name.removeprefix(prefix).removesuffix(".weight"): value
        for name, value in weights.items()
        if name.startswith(prefix)
    }


def _initial(name: str, size: tuple[int, ...]) -> Tensor:
    if len(size) == 1:
        # sharper queries than norm 1 gives: a head must single out one key of many
        return torch.full(size, 1.5 if "q_norm" in name else 1.0)
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return torch.zeros(size)
    return torch.randn(size) * 0.02
