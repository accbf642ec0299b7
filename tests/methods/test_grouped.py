"""The grouped method keeps the contract and the mass that it promises."""

import pytest
import torch

from minference.methods.grouped import Grouped
from minference.ops.build import Layout
from minference.ops.groups.plan import spread_rows
from minference.testing import Lines, check_method, context_for, layout_of, planted_qkv, random_qkv


def test_grouped_keeps_the_contract() -> None:
    check_method(Grouped())


def test_index_keeps_the_share_of_mass_with_fewer_tiles() -> None:
    lines = [Lines(torch.tensor([70, 700]), torch.arange(4))] * 2
    q, k, _ = planted_qkv(lines, 3000, kv_heads=1)
    layout = layout_of(q, k)
    context = context_for(layout, 2)
    index = Grouped(mass=0.9).build_index(q, k, context)
    mask = index.to_dense_mask()[0, 0]
    for group in range(6):
        rows = spread_rows(layout, group, 64)[0][0]
        scores = q[0][:, rows] @ k[0].transpose(1, 2) * context.scale
        future = torch.arange(3000) > rows[:, None]
        dense = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
        assert float((dense * mask[rows]).sum(dim=-1).mean()) >= 0.85
    assert index.density() < 0.7


def test_chunk_keeps_the_same_blocks_in_whole_groups_as_the_full_prompt() -> None:
    q, k, _ = random_qkv(4, 2, 2048)
    whole = Grouped().build_index(q, k, context_for(layout_of(q, k), 4))
    chunk = q[:, :, 1024:].contiguous()
    part = Grouped().build_index(chunk, k, context_for(layout_of(chunk, k), 4))
    for tile in range(8):
        for head in range(2):
            assert torch.equal(part.blocks.row(0, head, tile), whole.blocks.row(0, head, 8 + tile))


def test_cells_grow_with_contexts_beyond_128k() -> None:
    first, stop = torch.zeros(1), torch.ones(1)
    lengths = (1 << 10, 1 << 17, (1 << 17) + 1, 1 << 20, 1 << 23)
    plans = [Grouped(cell=4).plan(Layout(first, stop, n, n)) for n in lengths]
    assert [plan.cell for plan in plans] == [4, 4, 8, 32, 64]
    assert [plan.sum_cell for plan in plans] == [16, 16, 32, 64, 64]


@pytest.mark.parametrize(
    "options",
    [{"mass": 0.0}, {"mass": 1.1}, {"rows": 0}, {"cell": 3}, {"share": -0.1}, {"floor": 300}],
)
def test_bad_options_are_named(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        Grouped(**options)  # type: ignore[arg-type]
