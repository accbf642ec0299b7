"""Dense attention as a method: the baseline of every comparison."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from minference.methods.base import Context, Method


@dataclass(frozen=True, kw_only=True)
class Dense(Method):
    """Every causal key, by the best dense kernel."""

    name: ClassVar[str] = "dense"

    def build_index(self, q: Tensor, k: Tensor, context: Context) -> None:
        return None
