"""A method of one's own in one file: recent keys, and the keys of smallest norm.

python examples/custom_method.py

Keys of small norm draw much attention (arXiv 2406.11430), so this method keeps them as columns
beside a local band. Everything that takes a method takes it: `minference.attach`, vLLM, the
evaluation, the benchmarks. A package makes it known by name with

    [project.entry-points."minference.methods"]
    low_norm = "my_package.low_norm:LowNorm"
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import minference
from minference.index import SparseIndex
from minference.methods import Context, Method
from minference.ops.build import assemble, band_offsets
from minference.ops.select.lists import columns_from_positions
from minference.testing import check_method, tiny_model


@dataclass(frozen=True, kw_only=True)
class LowNorm(Method):
    """The last `local` keys, and in each head the `columns` keys of smallest norm.

    Attributes:
        columns: how many single keys to keep; the first one always is.
        local: length of the band, in tokens.
    """

    name: ClassVar[str] = "low_norm"
    columns: int = 64
    local: int = 256

    def build_index(self, q: Tensor, k: Tensor, context: Context) -> SparseIndex:
        layout, heads = context.layout, q.shape[1]
        norms = k.float().norm(dim=-1).repeat_interleave(heads // k.shape[1], dim=1)
        places = torch.arange(layout.kv_len, device=k.device)
        first, stop = layout.first[:, None, None], layout.stop[:, None, None]
        norms = norms.masked_fill((places < first) | (places >= stop), torch.inf)
        norms = norms.masked_fill(places == first, -1.0)
        chosen = norms.topk(min(self.columns, layout.kv_len), largest=False)
        positions = torch.where(chosen.values < torch.inf, chosen.indices - first, -1)
        return assemble(
            layout,
            heads,
            offsets=band_offsets(layout, (self.local,) * heads),
            columns=columns_from_positions(positions, layout.kv_len),
        )


def main() -> float:
    """Checks the method, then prefills a model with it; returns the density."""
    method = LowNorm(columns=32, local=128, min_seq_len=0)
    check_method(method)
    model = tiny_model()
    ids = torch.randint(3, 320, (1, 2048), generator=torch.Generator().manual_seed(0))
    with minference.attach(model, method, record=True) as attached:
        tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
    density = sum(float(record["density"]) for record in attached.records) / len(attached.records)
    print(f"answer {tokens[0, -4:].tolist()}, density {density:.3f}")
    return density


if __name__ == "__main__":
    main()
