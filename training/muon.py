"""Muon, the optimizer of the matrices (Jordan et al., 2024, kellerjordan.github.io/posts/muon).

Matrices of one size are stacked and orthogonalised together, which makes a step cheap.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(stack: Tensor, steps: int = 5) -> Tensor:
    """Moves the singular values of each matrix of a stack [N, R, C], R <= C, near one."""
    a, b, c = _QUINTIC
    x = stack.bfloat16() if stack.is_cuda else stack
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.to(stack.dtype)


class Muon:
    """Momentum, orthogonalised; the update's size does not depend on the gradient's."""

    def __init__(self, matrices: list[Tensor], momentum: float = 0.95) -> None:
        self.momentum = momentum
        self.groups: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for matrix in matrices:
            rows, columns = sorted(matrix.shape)
            self.groups[rows, columns].append(matrix)
        self.state = {
            size: torch.zeros(len(group), *size, device=group[0].device)
            for size, group in self.groups.items()
        }

    @torch.no_grad()
    def step(self, rate: float, decay: float) -> None:
        """Updates every matrix in place and forgets the gradients."""
        for size, group in self.groups.items():
            gradients = torch.stack([_wide(p.grad) for p in group if p.grad is not None])
            buffer = self.state[size]
            buffer.lerp_(gradients, 1 - self.momentum)
            update = orthogonalize(gradients.lerp(buffer, self.momentum))
            for matrix, change in zip(group, update, strict=True):
                turned = change if matrix.shape[0] <= matrix.shape[1] else change.mT
                scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                matrix.mul_(1 - rate * decay).add_(turned, alpha=-rate * scale)
                matrix.grad = None


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
