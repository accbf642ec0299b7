"""Dense attention on a GPU, by every kernel that it chooses from, against the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from minference.ops.attention import dense
from minference.testing import random_qkv, tolerance

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


def expected(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, softcap: float, sinks: Tensor | None
) -> Tensor:
    q, k, v = (x.float() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    seen = seen.tril(k.shape[2] - q.shape[2]) & keep[:, None, None]
    weights = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        weights = torch.cat([weights, sinks[:, None, None].expand(*scores.shape[:3], 1)], dim=3)
    return weights.softmax(dim=-1)[..., : k.shape[2]].nan_to_num(0.0) @ v


@pytest.mark.parametrize("flash3", [True, False])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("queries", [1, 2, 130, 700, 900])
def test_plain_causal_attention(
    queries: int, dim: int, flash3: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not flash3:
        monkeypatch.setattr(dense, "_flash3_serves", lambda *_: False)
    q, k, v = random_qkv(8, 2, queries, 900, dim=dim, dtype=BF16, device=device)
    out = dense.dense_attention(q, k, v)
    keep = torch.ones(1, 900, dtype=torch.bool, device=device)
    torch.testing.assert_close(out.float(), expected(q, k, v, keep, 0.0, None), **tolerance(BF16))
    assert torch.equal(out, dense.dense_attention(q, k, v))


@pytest.mark.parametrize("case", ["left", "right", "holes", "softcap", "sinks", "all", "narrow"])
@pytest.mark.parametrize("queries", [1, 100, 200, 900])
def test_attention_with_more_to_it(queries: int, case: str, device: torch.device) -> None:
    q, k, v = random_qkv(4, 2, queries, 900, dim=64, dtype=BF16, device=device)
    keep = torch.ones(1, 900, dtype=torch.bool, device=device)
    keep[:, : 37 if case in ("left", "all") else 0] = False
    keep[:, 880 if case == "right" else 900 :] = False
    if case == "holes":
        keep[:, 100:120] = False
    v = v[..., :24] if case == "narrow" else v
    softcap = 2.0 if case in ("softcap", "all") else 0.0
    sinks = torch.linspace(-1, 2, 4, device=device) if case in ("sinks", "all") else None
    padded = {"keep": keep} if case in ("left", "right", "holes", "all") else {}
    out = dense.dense_attention(q, k, v, softcap=softcap, sinks=sinks, **padded)
    right = expected(q, k, v, keep, softcap, sinks)
    real = keep[0, 900 - queries :]
    torch.testing.assert_close(out.float()[:, :, real], right[:, :, real], **tolerance(BF16))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("queries", [1, 100, 900])
def test_calls_of_little_work_are_not_planned(
    queries: int, padded: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[SDPBackend] = []
    plain = dense.sdpa

    def sdpa(*args: Any, **options: Any) -> Tensor:
        asked.extend(args[3] or [SDPBackend.CUDNN_ATTENTION])
        return plain(*args, **options)

    monkeypatch.setattr(dense, "sdpa", sdpa)
    monkeypatch.setattr(dense, "_flash3_serves", lambda *_: False)
    q, k, v = random_qkv(8, 2, queries, 900, dim=64, dtype=BF16, device=device)
    mask = torch.ones(1, 1, queries, 900, dtype=torch.bool, device=device).tril(900 - queries)
    mask[..., :9] = False
    dense.dense_attention(q, k, v, mask=mask if padded else None)
    assert bool(asked) == (queries == 900)
    assert SDPBackend.CUDNN_ATTENTION not in asked
    assert SDPBackend.CUDNN_ATTENTION in dense._backends(q, k, planned=queries)


def test_padding_known_to_be_at_an_end_is_not_looked_at(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = random_qkv(4, 2, 300, 300, dim=64, dtype=BF16, device=device)
    keep = torch.ones(1, 300, dtype=torch.bool, device=device)
    keep[:, :40] = False
    looked = dense.dense_attention(q, k, v, keep=keep)
    monkeypatch.setattr(dense, "has_holes", lambda keep: pytest.fail("waits for the device"))
    assert torch.equal(dense.dense_attention(q, k, v, keep=keep, holes=False), looked)
