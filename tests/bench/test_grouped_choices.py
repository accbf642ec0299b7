"""The benchmark of choices against sums written out, on random q, k and v."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import grouped_choices as choices
from minference.index import BLOCK, TILE

NUMBER = 6


def a_tile() -> tuple[torch.Tensor, choices.Tile]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(4, (NUMBER + 1) * TILE, 32, generator=generator)
    k, v = torch.randn(2, (NUMBER + 1) * TILE, 32, generator=generator)
    plan = replace(choices.METHOD.last_plan(choices.layout_of(q[None], k[None, None]), 3), rows=64)
    return q, choices.Tile(q, k, v, NUMBER, plan)


def test_every_block_gives_dense_attention_and_few_do_not() -> None:
    q, tile = a_tile()
    every = torch.ones(2 * (NUMBER + 1), dtype=torch.bool)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, tile.keys.expand(4, -1, -1), tile.values.expand(4, -1, -1), is_causal=True
    )[:, -TILE:]
    torch.testing.assert_close(tile.full, expected, atol=1e-5, rtol=1e-5)
    for out in (
        choices.listed(tile, every)[0],
        choices.with_samples(tile, every, 64, 0.02),
        choices.with_means(tile, q, every),
    ):
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert (choices.listed(tile, tile.always)[0] - expected).norm() > 0.1 * expected.norm()


def test_means_stand_for_blocks_of_equal_keys() -> None:
    q, tile = a_tile()
    tile.keys[:] = tile.keys.unflatten(0, (-1, BLOCK))[:, :1].repeat(1, BLOCK, 1).flatten(0, 1)
    scores = q[:, -TILE:] @ tile.keys.T * q.shape[-1] ** -0.5
    later = torch.ones_like(scores, dtype=torch.bool).triu(NUMBER * TILE + 1)
    tile.scores = scores.masked_fill(later, -torch.inf)
    expected = tile.scores.softmax(dim=-1) @ tile.values
    torch.testing.assert_close(
        choices.with_means(tile, q, tile.always), expected, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("rate", choices.RATINGS.values(), ids=list(choices.RATINGS))
def test_every_rating_puts_the_block_first_that_all_rows_read(rate: choices.Rating) -> None:
    _, tile = a_tile()
    tile.shares[:] = 1e-4
    tile.shares[:, 5 * BLOCK + BLOCK // 2] = 0.5
    assert int(tile.order(rate(tile))[0]) == 5


def test_budgets_give_more_to_tiles_that_lack_more() -> None:
    lacking = [torch.tensor([0.9, 0.5, 0.3, 0.1, 0.0]), torch.tensor([0.2, 0.1, 0.05, 0.0])]
    assert choices.budgets(lacking, 3) == [3, 0]
    assert choices.budgets(lacking, 4) == [3, 1]
    assert choices.budgets(lacking, 7) == [4, 3]
