"""The three kernel functions against their masks."""

import pytest
import torch
from torch import Tensor

from minference.functional import (
    block_sparse_attention,
    streaming_forward,
    vertical_slash_sparse_attention,
)
from minference.ops.attention.dense import dense_attention
from minference.testing import lines_mask, masked_attention, random_qkv, tolerance

IMPLS = ["reference", "torch"]


def distances(q_len: int, kv_len: int) -> Tensor:
    return torch.arange(kv_len - q_len, kv_len)[:, None] - torch.arange(kv_len)


def best(scores: Tensor, budget: int, forced: int = 0) -> Tensor:
    """The places of the highest scores, the first `forced` always among them."""
    order = sorted(range(len(scores)), key=lambda place: (place >= forced, -scores[place]))
    return torch.tensor(order[: max(budget, forced)])


def last_query_sums(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of one head's last 64 queries, summed down each column and along each diagonal."""
    distance = distances(len(q), len(k))[-64:]
    scores = q[-64:].double() @ k.double().T * q.shape[1] ** -0.5
    weights = scores.masked_fill(distance < 0, -torch.inf).softmax(dim=-1)
    diagonals = [weights[distance == x].sum() for x in range(len(k))]
    return weights.sum(dim=0), torch.stack(diagonals)


def block_means(x: Tensor) -> Tensor:
    """Means of 64 rows, rows past the end as zeros."""
    return torch.stack([part.sum(dim=0) / 64 for part in x.double().split(64)])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (65, 65), (300, 300), (129, 300)])
def test_streaming_is_exact(q_len: int, kv_len: int, impl: str) -> None:
    q, k, v = random_qkv(4, 2, q_len, kv_len)
    d = distances(q_len, kv_len)
    mask = (d >= 0) & ((d < 70) | (torch.arange(kv_len) < 5))
    expected = masked_attention(q, k, v, mask[None, None])
    torch.testing.assert_close(streaming_forward(q, k, v, 5, 70, impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("length", [1, 64, 300, 700])
def test_block_sparse_is_exact(length: int, impl: str) -> None:
    q, k, v = random_qkv(4, 2, length)
    mask = torch.zeros(1, 4, length, length, dtype=torch.bool)
    for h in range(4):
        scores = block_means(q[0, h]) @ block_means(k[0, h // 2]).T
        for row in range(len(scores)):
            for j in best(scores[row, : row + 1], 2).tolist():
                mask[0, h, 64 * row : 64 * row + 64, 64 * j : 64 * j + 64] = True
    mask &= distances(length, length) >= 0
    out = block_sparse_attention(q, k, v, 2, impl=impl)
    torch.testing.assert_close(out, masked_attention(q, k, v, mask))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("vertical", "slash"), [(40, 60), (35, 102)])
@pytest.mark.parametrize(("q_len", "kv_len"), [(300, 300), (700, 700), (129, 700)])
def test_budgets_keep_the_best_lines(
    q_len: int, kv_len: int, vertical: int, slash: int, impl: str
) -> None:
    q, k, v = random_qkv(4, 2, q_len, kv_len)
    masks = []
    for h in range(4):
        columns, diagonals = last_query_sums(q[0, h], k[0, h // 2])
        lines = best(columns, vertical, forced=30), best(diagonals, slash, forced=100)
        masks.append(lines_mask(*lines, q_len, kv_len))
    mask = torch.stack(masks)[None]
    assert bool((mask[:, :, -1].sum(dim=-1) < kv_len).all())
    out = vertical_slash_sparse_attention(q, k, v, vertical, slash, impl=impl)
    torch.testing.assert_close(out, masked_attention(q, k, v, mask))


@pytest.mark.parametrize("impl", IMPLS)
def test_enough_lines_give_dense_attention(impl: str) -> None:
    q, k, v = random_qkv(4, 2, 300)
    dense = masked_attention(q, k, v, (distances(300, 300) >= 0)[None, None])
    every = torch.arange(299, -1, -1).expand(1, 4, 300)
    none = torch.zeros(1, 4, 0, dtype=torch.long)
    for vertical, slash in [(every, none), (none, every), (0, 300), (300, 1)]:
        out = vertical_slash_sparse_attention(q, k, v, vertical, slash, impl=impl)
        torch.testing.assert_close(out, dense)


def test_named_lines_are_attended_to() -> None:
    q, k, v = random_qkv(2, 2, 600)
    v.zero_()
    v[:, :, 100] = 1.0
    columns, slashes = torch.tensor([[[100], [5]]]), torch.tensor([[[0], [450]]])
    out = vertical_slash_sparse_attention(q, k, v, columns, slashes)
    assert bool((out[0, 0, 100:, 0] > 0).all())
    assert float(out[0, 1, 550, 0]) > 0
    assert float(out[0, 1, 400, 0]) == 0


@pytest.mark.parametrize(
    ("vertical", "slash", "error", "message"),
    [
        (torch.zeros(1, 2, 3, dtype=torch.long), 5, ValueError, "shape \\[batch 1, heads 4, n\\]"),
        (5, torch.full((1, 4, 1), 70), ValueError, "must lie in \\[0, 70\\), got values from 70"),
        (5, torch.full((1, 4, 1), -1), ValueError, "got values from -1 to -1"),
        (torch.zeros(1, 4, 3), 5, TypeError, "int32 or int64 tensor, got torch.float32"),
        (-1, 5, ValueError, "vertical_topk must be at least 0, got -1"),
        (5, 0, ValueError, "slash must be at least 1, got 0"),
    ],
)
def test_bad_lines_are_named(vertical, slash, error, message: str) -> None:  # noqa: ANN001
    q, k, v = random_qkv(4, 2, 70)
    with pytest.raises(error, match=message):
        vertical_slash_sparse_attention(q, k, v, vertical, slash)


def test_counts_beyond_the_prompt_are_the_prompt() -> None:
    q, k, v = random_qkv(4, 2, 300)
    huge, dense = 10**30, dense_attention(q, k, v)
    for out in (
        vertical_slash_sparse_attention(q, k, v, huge, huge),
        block_sparse_attention(q, k, v, huge),
        streaming_forward(q, k, v, huge, huge),
    ):
        torch.testing.assert_close(out, dense, **tolerance(q.dtype))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k, v: block_sparse_attention(q, k, v, 0), "topk must be at least 1, got 0"),
        (lambda q, k, v: streaming_forward(q, k, v, -1, 5), "init_num must be at least 0"),
        (lambda q, k, v: streaming_forward(q, k, v, 1, 0), "local_window_num must be at least 1"),
    ],
)
def test_bad_counts_are_named(call, message: str) -> None:  # noqa: ANN001
    with pytest.raises(ValueError, match=message):
        call(*random_qkv(4, 2, 70))
