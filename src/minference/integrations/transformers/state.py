"""What an attached model carries: its method, options and records, found by its config object."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minference import env
from minference.integrations.transformers.coverage import DENSE_FROM
from minference.integrations.transformers.records import LayerRecord, Mark, mark
from minference.log import info_once
from minference.methods import MInference
from minference.methods.base import Context, Method
from minference.methods.spec import fitting_patterns
from minference.methods.thresholds import min_seq_len, min_work, work

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass
class State:
    """One model's sparse attention.

    Attributes:
        method: what builds the indices.
        starting_layer: layers below it are dense.
        min_seq_len: context length from which prompts are served sparsely; None asks `method`,
            and leaves calls of little work dense.
        impl: implementation of the operations.
        precision: what the sparse kernels multiply in, "native" or "fp8".
        record: whether to keep the records of the last prefill.
        dense_from: covered share from which the dense kernel serves; above 1 never.
        recall_rows: rows of each layer of which to record the kept mass.
        on_layer: called with each layer's number after its attention in a long prefill.
        observe: called with context, queries, keys and values of each layer of a long prefill.
        reuse: whether the answer may take the memory of the queries.
        called: whether attention was asked for, dense or not.
        looked_at: the positions that `packed` saw last, and what it found.
        layers: records of the last prefill.
    """

    method: Method
    starting_layer: int = 0
    min_seq_len: int | None = None
    impl: str = "auto"
    precision: str = "native"
    record: bool = False
    dense_from: float = DENSE_FROM
    recall_rows: int = 0
    on_layer: Callable[[int], None] | None = None
    observe: Callable[[Context, Tensor, Tensor, Tensor], None] | None = None
    reuse: bool = False
    called: bool = False
    looked_at: tuple[weakref.ref[Tensor], bool] | None = None
    layers: list[LayerRecord] = field(default_factory=list)

    def sparse(
        self, q_len: int, kv_len: int, device_type: str, heads: int | None = None, dim: int = 0
    ) -> bool:
        """Whether a call of these lengths is a long prefill, and enough work for sparse attention
        to win where heads and their dimension are known, as in `work`."""
        least = self.min_seq_len
        least = min_seq_len(self.method, device_type) if least is None else least
        if q_len < 2 or kv_len < least or 2 * q_len < min(least, 256) or env.disabled():
            return False
        if heads is None or self.min_seq_len is not None:
            return True
        enough = work(q_len, kv_len, heads, dim) >= min_work(self.method, device_type)
        if not enough:
            info_once(
                "few heads or queries: dense, which is faster then; min_seq_len=0 serves them"
            )
        return enough

    def packed(self, positions: Tensor | None) -> bool:
        """Whether the positions [B, L] of a forward restart; one look, at its first layer."""
        if positions is None or positions.dim() != 2:
            return False
        if self.looked_at is None or self.looked_at[0]() is not positions:
            restarts = bool((positions[:, 1:] <= positions[:, :-1]).any())
            self.looked_at = weakref.ref(positions), restarts
        return self.looked_at[1]

    def mark(self, device: torch.device) -> Mark:
        """The time, where records are kept."""
        return mark(device) if self.record else 0.0

    def note(self, layer: LayerRecord) -> None:
        """Keeps the record of a layer; the first layer of a prefill drops those of the last."""
        if not self.record:
            return
        if self.layers and layer.layer <= self.layers[-1].layer:
            self.layers.clear()
        self.layers.append(layer)


_STATES: dict[int, tuple[weakref.ref[PreTrainedConfig], State]] = {}


def find(config: PreTrainedConfig) -> State:
    """The state of a config object; by name alone a model gets its table or default patterns."""
    held = _STATES.get(id(config))
    if held is not None and held[0]() is config:
        return held[1]
    state = State(MInference(patterns=fitting_patterns(config)))
    info_once(f"attn_implementation='minference': {config.model_type} with its default patterns")
    put(config, state)
    return state


def put(config: PreTrainedConfig, state: State) -> None:
    """Gives a config object its state, until `drop` or the end of the object."""
    key = id(config)
    _STATES[key] = weakref.ref(config, lambda _: _STATES.pop(key, None)), state


def drop(config: PreTrainedConfig) -> None:
    """Forgets the state of a config object."""
    _STATES.pop(id(config), None)


def attached() -> int:
    """Number of config objects that hold a state."""
    return len(_STATES)


def holds(config: PreTrainedConfig, state: State) -> bool:
    """Whether this state is the one that the config object carries."""
    held = _STATES.get(id(config))
    return held is not None and held[1] is state
