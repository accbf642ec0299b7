"""What the attention implementations of both devices share: which layers, which rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType

from minference.errors import UnsupportedError
from minference.integrations.vllm.prefill import LayerPrefill, Runtime
from minference.log import info_once


class SparseLayer:
    """Mixed into a stock attention implementation; without a runtime it changes nothing.

    The host class provides num_heads, head_size, scale, attn_type, alibi_slopes and sinks.
    """

    runtime: Runtime | None = None
    _own: LayerPrefill | None = None

    num_heads: int
    head_size: int
    scale: float
    attn_type: str
    alibi_slopes: Any
    sinks: Any

    @classmethod
    def from_stock(cls, stock: object, runtime: Runtime) -> SparseLayer:
        """A copy of a running engine's implementation that serves long rows."""
        impl = cls.__new__(cls)
        impl.__dict__.update(stock.__dict__)
        impl.runtime = runtime
        return impl

    def window(self) -> int:
        """Keys that a query sees; -1 for all."""
        raise NotImplementedError

    def softcap(self) -> float:
        """Bound of the scores; 0 for none."""
        raise NotImplementedError

    def prefill(self, layer: Any) -> LayerPrefill | None:  # noqa: ANN401
        """This layer's sparse attention; None where the stock one serves every row."""
        if self.runtime is None or self.attn_type != AttentionType.DECODER:
            return None
        if self.window() >= 0:
            info_once("layers with a sliding window keep vLLM's own attention")
            return None
        if self._own is None:
            if not self.serves(layer.layer_name):
                return None
            self._own = self._make(layer.layer_name)
            self.runtime.recorder.last_layer = _last_layer()
        return self._own

    def serves(self, name: str) -> bool:
        """Whether long rows of the layer of this name are served: full attention, of the model
        itself. Layers that draft tokens go on counting behind the model's or say so."""
        if self.runtime is None or self.attn_type != AttentionType.DECODER or self.window() >= 0:
            return False
        least, most = self.runtime.options.starting_layer, self.runtime.layers
        return not name.startswith("draft_model.") and least <= extract_layer_index(name) < most

    def do_kv_cache_update(
        self,
        layer: Any,  # noqa: ANN401
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """Writes keys and values as the host does, never a failed row's NaN."""
        if self.runtime is not None:
            key, value = self.runtime.clean(key), self.runtime.clean(value)
        host: Any = super()
        host.do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)

    def start_step(self) -> None:
        """Tells the shared state that a forward pass began, if one did."""
        assert self.runtime is not None
        step = get_forward_context()
        if self.runtime.step is not step:
            self.runtime.step = step
            self.runtime.start_step()

    def _make(self, name: str) -> LayerPrefill:
        assert self.runtime is not None
        if self.alibi_slopes is not None:
            raise UnsupportedError(
                f"minference cannot serve ALiBi ({name}); serve this model without it"
            )
        begin = get_tensor_model_parallel_rank() * self.num_heads
        return LayerPrefill(
            runtime=self.runtime,
            layer=extract_layer_index(name),
            heads=tuple(range(begin, begin + self.num_heads)),
            head_dim=self.head_size,
            scale=self.scale,
            softcap=self.softcap(),
            sinks=self.sinks,
        )


def _last_layer() -> int:
    layers = get_forward_context().no_compile_layers.items()
    own = [
        extract_layer_index(name)
        for name, layer in layers
        if isinstance(impl := getattr(layer, "impl", None), SparseLayer) and impl.serves(name)
    ]
    return max(own)
