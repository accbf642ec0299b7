"""What a method is: it looks at q and k and says, as a `SparseIndex`, which keys each query needs.

A new method is one file: a frozen dataclass with a `name` and a `build_index`, registered in
`minference.methods` or through the entry point group of that name.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from minference.index import SparseIndex
from minference.ops.build import Layout


@dataclass(frozen=True)
class Context:
    """What a method may know of a call besides q and k.

    Attributes:
        layout: which places of the buffers hold real tokens.
        layer: number of the attention layer in the model.
        heads: global numbers of q's heads; under tensor parallelism a part of the model's.
        scale: factor of the scores.
        softcap: scores become softcap * tanh(score / softcap); 0 for none.
        impl: implementation of the operations, as in `sparse_attention`.
        sinks: a logit for each of q's heads that takes part in the softmax without a value; None
            for none.
    """

    layout: Layout
    layer: int
    heads: tuple[int, ...]
    scale: float
    softcap: float = 0.0
    impl: str = "auto"
    sinks: Float[Tensor, " H"] | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Builds the index of one attention call.

    Attributes:
        min_seq_len: contexts of fewer tokens are served by the best dense kernel; None means what
            was measured for the device: a length, on a CPU `cpu_tokens` where that is more, and on
            a GPU calls of less work than `cuda_work` are dense too.
    """

    name: ClassVar[str]
    cpu_tokens: ClassVar[int] = 0
    # dense attention takes 3 ms for it on an H100; `grouped` takes 1.4 to 3 for less, most of which
    # is launches: benchmarks/results/small_calls_h100.jsonl
    cuda_work: ClassVar[int] = 1 << 39
    min_seq_len: int | None = None

    def __post_init__(self) -> None:
        if not hasattr(self, "name"):
            raise TypeError(
                f"{type(self).__name__} has no name; set `name: ClassVar[str]`, by which it is "
                "asked for and recorded"
            )
        for own in fields(self):
            _check_value(own, getattr(self, own.name))
        if self.min_seq_len is not None and self.min_seq_len < 0:
            raise ValueError(
                f"min_seq_len must be None or at least 0 tokens, got {self.min_seq_len}"
            )

    def keys_per_row(self, layer: int | None = None) -> float | None:
        """Most keys a row that the budgets buy, on average over the heads of a layer, or of the
        model; None where nothing bounds them."""
        return None

    @abstractmethod
    def build_index(
        self, q: Float[Tensor, "B H L D"], k: Float[Tensor, "B Hkv N D"], context: Context
    ) -> SparseIndex | None:
        """The index of this call, or None where the method asks for dense attention."""


def _check_value(own: Field[Any], value: object) -> None:
    """Raises where a field that holds a number or a truth got something else."""
    kind = own.type.__name__ if isinstance(own.type, type) else str(own.type)
    if kind == "bool" and not isinstance(value, bool):
        raise TypeError(f"{own.name} must be True or False, got {value!r}")
    if value is None and kind in ("int | None", "float | None"):
        return
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind in ("int", "int | None") and not whole:
        raise TypeError(f"{own.name} must be a whole number, got {value!r}")
    if isinstance(value, int) and abs(value) >= 1 << 31:
        raise ValueError(f"{own.name} must be less than 2^31, got {value}")
    finite = whole or (isinstance(value, float) and math.isfinite(value))
    if kind in ("float", "float | None") and not finite:
        raise TypeError(f"{own.name} must be a finite number, got {value!r}")
