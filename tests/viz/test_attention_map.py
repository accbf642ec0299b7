"""The pooled maps against the whole matrices."""

import pytest
import torch

from minference.testing import layout_of, mixed_index, random_qkv
from minference.viz.attention_map import attention_figure, computed_cells, pooled_attention


def pooled(full: torch.Tensor, cells: int) -> torch.Tensor:
    cell = torch.arange(full.shape[0]) * cells // full.shape[0]
    members = torch.nn.functional.one_hot(cell, cells).float()
    return members.T @ full @ members / (members.sum(0)[:, None] * members.sum(0))


@pytest.mark.parametrize(("length", "cells"), [(300, 7), (300, 300), (50, 256)])
def test_pooled_attention_is_the_mean_of_the_weights(length: int, cells: int) -> None:
    q, k, _ = random_qkv(1, 1, length)
    scores = q[0, 0] @ k[0, 0].T * 0.3
    causal = torch.ones(length, length).triu(1).bool()
    full = scores.masked_fill(causal, -torch.inf).softmax(-1)
    got = pooled_attention(q[0, 0], k[0, 0], scale=0.3, cells=cells)
    torch.testing.assert_close(got, pooled(full, min(cells, length)), atol=1e-6, rtol=1e-4)


def test_computed_cells_are_the_mask() -> None:
    q, k, _ = random_qkv(5, 1, 300)
    index = mixed_index(layout_of(q, k), 5)
    mask = index.to_dense_mask().float()
    for head in range(5):
        torch.testing.assert_close(computed_cells(index, head, 9), pooled(mask[0, head], 9))


def test_a_map_needs_all_queries() -> None:
    with pytest.raises(ValueError, match="query for each of 20 keys, got 5"):
        pooled_attention(torch.zeros(5, 8), torch.zeros(20, 8), scale=1.0)


def test_the_figure_has_both_panels() -> None:
    square = torch.full((4, 4), 0.25).tril()
    figure = attention_figure(square, (square > 0).float(), length=400, title="layer 0")
    assert [axis.get_title() for axis in figure.axes[:2]] == ["attention", "computed tiles"]
