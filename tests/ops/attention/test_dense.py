"""Dense attention by whichever kernel is there."""

import sys
from types import ModuleType

import pytest
import torch
from torch.nn.attention import SDPBackend

from minference.errors import UnsupportedError
from minference.ops.attention import dense
from minference.testing import random_qkv, tolerance


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1 + k.shape[2] - q.shape[2])
    return scores.masked_fill(later, -torch.inf).softmax(dim=-1) @ v


@pytest.mark.parametrize("queries", [1, 65, 300])
def test_dense_attention_is_the_softmax(queries: int) -> None:
    q, k, v = random_qkv(4, 2, queries, 300)
    out = dense.dense_attention(q, k, v)
    torch.testing.assert_close(out, expected(q, k, v), **tolerance(torch.float32))


@pytest.mark.parametrize("queries", [2, 65, 300])
def test_the_last_query_sits_at_the_last_key(queries: int) -> None:
    q, k, v = random_qkv(4, 2, queries, 300)
    torch.testing.assert_close(dense.flash2(q, k, v), expected(q, k, v), **tolerance(torch.float32))


def test_dense_attention_in_fp8() -> None:
    q, k, v = random_qkv(4, 2, 200, 300)
    keep = torch.arange(300)[None] >= 17
    sinks = torch.tensor([0.0, 1.0, -1.0, 2.0])
    options = {"keep": keep, "sinks": sinks, "softcap": 20.0}
    native = dense.dense_attention(q, k, v[..., :24], **options)
    out = dense.dense_attention(q, k, v[..., :24], **options, precision="fp8")
    assert out.shape == native.shape
    assert 1e-2 < (out - native).norm() / native.norm() < 6e-2
    with pytest.raises(UnsupportedError, match="without `mask` and dropout"):
        dense.dense_attention(q, k, v, dropout=0.1, precision="fp8")
    with pytest.raises(UnsupportedError, match="values no wider than keys"):
        dense.dense_attention(q[..., :8], k[..., :8], v, precision="fp8")
    keep[:, 100] = False
    with pytest.raises(UnsupportedError, match="with holes"):
        dense.dense_attention(q, k, v, keep=keep, precision="fp8")
    with pytest.raises(ValueError, match="unknown precision 'fp16'"):
        dense.dense_attention(q, k, v, precision="fp16")


@pytest.mark.parametrize("name", dense.FLASH3_NAMES)
def test_flash3_goes_by_either_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        softmax_scale: float,
        causal: bool,
        num_splits: int,
    ) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        assert causal
        splits.append(num_splits)
        assert softmax_scale == pytest.approx(32**-0.5)
        return expected(q, k, v).transpose(1, 2)

    splits: list[int] = []
    module = ModuleType(name)
    module.flash_attn_func = attend  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(dense, "FLASH3", name)
    monkeypatch.setattr(dense, "_flash3_serves", lambda *_: True)
    for heads in (4, 106):
        q, k, v = random_qkv(heads, 2, 100)
        torch.testing.assert_close(dense.dense_attention(q, k, v), expected(q, k, v))
    assert splits == [0, 1]  # its own choice where few tiles would leave the GPU idle


def test_a_named_kernel_is_not_replaced() -> None:
    q, k, v = random_qkv(4, 2, 100)
    plain = dense.sdpa(q, k, v, [SDPBackend.MATH])
    torch.testing.assert_close(plain, expected(q, k, v), **tolerance(torch.float32))
    with pytest.raises(RuntimeError, match="kernel"):
        dense.sdpa(q, k, v, [SDPBackend.CUDNN_ATTENTION])


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ({"queries": 0}, {}, r"q must hold 1 to 300 rows .* got 0"),
        ({"queries": 301}, {}, r"q must hold 1 to 300 rows .* got 301"),
        ({"heads": 3}, {}, "q's 3 heads must be a multiple of k's KV heads, got 2"),
        ({"values": 299}, {}, r"v must have k's \[1, 2, 300\] rows, got \[1, 2, 299\]"),
        ({}, {"keep": torch.ones(1, 200) > 0}, r"keep must have shape \[1, 300\], got \[1, 200\]"),
        (
            {},
            {"mask": torch.ones(1, 1, 1, 300) > 0},
            r"mask must have shape \[1, 4, 200, 300\], or 1 .* got \[1, 1, 1, 300\]",
        ),
    ],
)
def test_bad_shapes_are_named(
    sizes: dict[str, int], options: dict[str, torch.Tensor], message: str
) -> None:
    wanted = {"heads": 4, "queries": 200, "values": 300} | sizes
    q = torch.zeros(1, wanted["heads"], wanted["queries"], 16)
    k, v = torch.zeros(1, 2, 300, 16), torch.zeros(1, 2, wanted["values"], 16)
    with pytest.raises(ValueError, match=message):
        dense.dense_attention(q, k, v, **options)
