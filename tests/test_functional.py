"""The three kernel functions against their masks."""

import pytest
import torch
import torch.nn.functional as F

from minference.functional import (
    block_sparse_attention,
    streaming_forward,
    vertical_slash_sparse_attention,
)
from minference.ops.pool.reference import best_blocks
from minference.testing import random_qkv

IMPLS = ["reference", "torch"]


def masked(q, k, v, mask):  # noqa: ANN001, ANN201
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def distances(q_len: int, kv_len: int) -> torch.Tensor:
    return torch.arange(kv_len - q_len, kv_len)[:, None] - torch.arange(kv_len)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (65, 65), (300, 300), (129, 300)])
def test_streaming_is_exact(q_len: int, kv_len: int, impl: str) -> None:
    q, k, v = random_qkv(4, 2, q_len, kv_len)
    d = distances(q_len, kv_len)
    mask = (d >= 0) & ((d < 70) | (torch.arange(kv_len) < 5))
    torch.testing.assert_close(streaming_forward(q, k, v, 5, 70, impl=impl), masked(q, k, v, mask))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("length", [1, 64, 300, 700])
def test_block_sparse_is_exact(length: int, impl: str) -> None:
    q, k, v = random_qkv(4, 2, length)
    mask = torch.zeros(1, 4, length, length, dtype=torch.bool)
    for h in range(4):
        for row, blocks in enumerate(best_blocks(q[0, h], k[0, h // 2], 2, keep_ends=False)):
            for j in blocks.tolist():
                mask[0, h, 64 * row : 64 * row + 64, 64 * j : 64 * j + 64] = True
    mask &= distances(length, length) >= 0
    out = block_sparse_attention(q, k, v, 2, impl=impl)
    torch.testing.assert_close(out, masked(q, k, v, mask))


@pytest.mark.parametrize("impl", IMPLS)
def test_enough_lines_give_dense_attention(impl: str) -> None:
    q, k, v = random_qkv(4, 2, 300)
    dense = masked(q, k, v, distances(300, 300) >= 0)
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
