"""Every CPU implementation against the oracle, the oracle against SDPA under the dense mask."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from minference.errors import UnsupportedError
from minference.index import Ragged
from minference.ops.attention.api import sparse_attention
from minference.ops.attention.dense import dense_attention
from minference.ops.build import a_shape_index, assemble, dense_index
from minference.ops.estimate.api import last_query_masses
from minference.testing import layout_of, masked_attention, mixed_index, random_qkv, tolerance

LOOSE = {"atol": 1e-5, "rtol": 1e-4}

SHAPES = [
    (1, 1),
    (63, 63),
    (64, 64),
    (65, 65),
    (127, 127),
    (129, 129),
    (300, 300),
    (129, 300),
    (1, 65),
]


def masked_sdpa(q, k, v, mask, scale=None):  # noqa: ANN001, ANN201
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).nan_to_num()


@pytest.mark.parametrize("pad", [0, 37])
@pytest.mark.parametrize(("q_len", "kv_len"), SHAPES)
def test_reference_matches_sdpa(q_len: int, kv_len: int, pad: int) -> None:
    q, k, v = random_qkv(10, 2, q_len, kv_len + pad, batch=2)
    index = mixed_index(layout_of(q, k, left_padding=(0, pad)), 10)
    out = sparse_attention(q, k, v, index, impl="reference")
    torch.testing.assert_close(out, masked_sdpa(q, k, v, index.to_dense_mask()))


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.float32, "native"),
        (torch.float16, "native"),
        (torch.bfloat16, "native"),
        (torch.bfloat16, "fp8"),
    ],
)
@pytest.mark.parametrize("pad", [0, 37])
@pytest.mark.parametrize(("q_len", "kv_len"), SHAPES)
@pytest.mark.usefixtures("nan_poison")
def test_torch_matches_reference(
    q_len: int, kv_len: int, pad: int, dtype: torch.dtype, precision: str
) -> None:
    q, k, v = random_qkv(10, 2, q_len, kv_len + pad, batch=2, dtype=dtype)
    k[1, :, :pad], v[1, :, :pad] = torch.nan, torch.nan
    index = mixed_index(layout_of(q, k, left_padding=(0, pad), right_padding=(0, pad // 9)), 10)
    options = {"softcap": 20.0, "precision": precision}
    expected, expected_lse = sparse_attention(
        q, k, v, index, return_lse=True, impl="reference", **options
    )
    out, lse = sparse_attention(q, k, v, index, return_lse=True, impl="torch", **options)
    torch.testing.assert_close(out, expected, **tolerance(dtype))
    torch.testing.assert_close(lse, expected_lse, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_fp8_is_near_native(impl: str) -> None:
    q, k, v = random_qkv(4, 2, 300, dim=64)
    index = dense_index(layout_of(q, k), 4)
    native = sparse_attention(q, k, v, index, impl=impl)
    error = (sparse_attention(q, k, v, index, impl=impl, precision="fp8") - native).norm()
    assert 1e-2 < error / native.norm() < 6e-2
    with pytest.raises(ValueError, match="unknown precision 'int8': valid names are fp8, native"):
        sparse_attention(q, k, v, index, precision="int8")


def test_index_shared_by_the_heads_of_a_kv_head() -> None:
    q, k, v = random_qkv(8, 2, 200, 333)
    index = mixed_index(layout_of(q, k), 2)
    expected = masked_sdpa(q, k, v, index.to_dense_mask().repeat_interleave(4, 1))
    for impl in ("reference", "torch"):
        torch.testing.assert_close(sparse_attention(q, k, v, index, impl=impl), expected)


def test_sinks_take_part_in_the_softmax() -> None:
    q, k, v = random_qkv(4, 4, 100)
    sinks = torch.tensor([0.0, 3.0, -2.0, 10.0])
    out, lse = sparse_attention(
        q, k, v, dense_index(layout_of(q, k), 4), sinks=sinks, return_lse=True
    )
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(
        torch.ones(100, 100).triu(1).bool(), -torch.inf
    )
    with_sink = torch.cat([sinks[None, :, None, None].expand(1, 4, 100, 1), scores], dim=-1)
    torch.testing.assert_close(out, with_sink.softmax(dim=-1)[..., 1:] @ v)
    torch.testing.assert_close(lse, with_sink.logsumexp(dim=-1))


@pytest.mark.parametrize("sinks", [torch.zeros(4, 1), torch.zeros(1), torch.zeros(3), 1.0])
def test_bad_sinks_are_refused(sinks: object) -> None:
    q, k, v = random_qkv(4, 2, 100)
    index = dense_index(layout_of(q, k), 4)
    match = r"sinks must be a tensor of shape \[4\], a logit a query head, on cpu, got"
    for attend in (partial(sparse_attention, index=index), dense_attention):
        with pytest.raises(ValueError, match=match):
            attend(q, k, v, sinks=sinks)


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
@pytest.mark.parametrize("half", [0, 1, 2])
# the interpreter of Triton 3.6 turns arrays of one element into numbers
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
def test_rows_without_keys_give_zeros(impl: str, half: int, device: torch.device) -> None:
    q, k, v = random_qkv(2, 1, 300, dim=32, device=device)
    layout = layout_of(q, k)
    entries = torch.tensor([half], dtype=torch.int32, device=device)
    count = torch.full((1, 2, 3), int(half > 0), dtype=torch.int32, device=device)
    block0 = Ragged(entries, torch.zeros(1, 2, 3, dtype=torch.int64, device=device), count)
    index = assemble(layout, 2, blocks=block0, group_tiles=1)
    out, lse = sparse_attention(q, k, v, index, return_lse=True, impl=impl)
    mask = index.to_dense_mask()
    seen = mask.any(dim=-1)
    assert 0 < int((~seen).sum()) == int((out == 0).all(dim=-1).sum())
    torch.testing.assert_close(out, masked_attention(q, k, v, mask), **LOOSE)
    assert torch.equal(lse == -torch.inf, ~seen)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_rows_without_keys_give_zeros_in_fp8(impl: str) -> None:
    q, k, v = random_qkv(2, 1, 300)
    columns = Ragged.from_rows(torch.full((1, 2, 1, 1), 70), torch.ones(1, 2, 1, dtype=torch.int32))
    index = assemble(layout_of(q, k), 2, columns=columns)
    out = sparse_attention(q, k, v, index, precision="fp8", impl=impl)
    seen = index.to_dense_mask().any(dim=-1)
    assert torch.equal((out != 0).any(dim=-1), seen)


def test_padding_gives_zeros_beside_an_absent_sink() -> None:
    q, k, v = random_qkv(4, 2, 200)
    layout = layout_of(q, k, left_padding=(10,), right_padding=(7,))
    index = a_shape_index(layout, (5,) * 4, (60,) * 4)
    out = sparse_attention(q, k, v, index, sinks=torch.full((4,), -torch.inf))
    torch.testing.assert_close(out, sparse_attention(q, k, v, index))
    assert int((out == 0).all(dim=-1).sum()) == 17 * 4


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*NaN slice:RuntimeWarning")
def test_what_is_no_number_stays_none(impl: str, device: torch.device) -> None:
    q, k, v = random_qkv(2, 1, 300, dim=32, device=device)
    q[0, 0, 5, 0] = torch.nan
    k[0, 0, 290, 0] = torch.nan
    index = dense_index(layout_of(q, k), 2)
    out, lse = sparse_attention(q, k, v, index, return_lse=True, impl=impl)
    bad = torch.zeros(1, 2, 300, dtype=torch.bool, device=device)
    bad[:, :, 290:] = bad[0, 0, 5] = True
    assert torch.equal(out.isnan().any(dim=-1), bad)
    assert torch.equal(lse.isnan(), bad)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
def test_the_widest_window_is_dense(impl: str, device: torch.device) -> None:
    q, k, v = random_qkv(2, 1, 200, device=device)
    widest = a_shape_index(layout_of(q, k), (5,) * 2, ((1 << 31) - 1,) * 2)
    dense = sparse_attention(q, k, v, dense_index(layout_of(q, k), 2), impl="reference")
    torch.testing.assert_close(sparse_attention(q, k, v, widest, impl=impl), dense, **LOOSE)


@pytest.mark.parametrize("bad", [{"scale": 0.0}, {"scale": -0.2}, {"scale": math.nan}])
@pytest.mark.parametrize("cap", [{"softcap": -1.0}, {"softcap": math.inf}, {}])
def test_bad_factors_are_refused(bad: dict[str, float], cap: dict[str, float]) -> None:
    q, k, v = random_qkv(4, 2, 100)
    layout = layout_of(q, k)
    index, bounds = dense_index(layout, 4), (layout.first, layout.stop)
    name = "softcap must be 0" if cap else "scale must be a finite number above 0"
    for attend in (partial(sparse_attention, index=index), dense_attention):
        with pytest.raises(ValueError, match=name):
            attend(q, k, v, **bad, **cap)
    with pytest.raises(ValueError, match=name):
        last_query_masses(q, k, *bounds, **bad, **cap)


def test_scale_is_honoured() -> None:
    q, k, v = random_qkv(4, 2, 100)
    index = dense_index(layout_of(q, k), 4)
    expected = masked_sdpa(q, k, v, index.to_dense_mask(), scale=0.03)
    torch.testing.assert_close(sparse_attention(q, k, v, index, scale=0.03), expected)


def test_custom_operator_is_well_formed() -> None:
    q, k, v = random_qkv(4, 2, 70)
    index = mixed_index(layout_of(q, k), 4)
    args = (q, k, v, index.tensors(), 70, 70, 0.2, 0.0, True, "torch")
    checks = ("test_schema", "test_faketensor")
    for more in ((), (True,)):
        call = (*args, *more)
        torch.library.opcheck(torch.ops.minference.sparse_attention, call, test_utils=checks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), r"q must have 4 dimensions"),
        (lambda q, k, v: (q.double(), k, v), "q must be of dtype float16, bfloat16, float32, got"),
        (lambda q, k, v: (q, k.half(), v), "k must have q's dtype torch.float32, got torch.float1"),
        (lambda q, k, v: (q[:, :0], k, v), "a head and a head_dim of at least 1"),
        (lambda q, k, v: (q[:0], k[:0], v[:0]), "a batch row, a head and a head_dim of at least"),
        (lambda q, k, v: (q[..., :0], k[..., :0], v[..., :0]), "a head and a head_dim of at"),
        (lambda q, k, v: (q, k, v[:, :, :10]), "v must have k's shape"),
        (lambda q, k, v: (q[:, :3], k, v), "multiple of k's KV heads"),
        (lambda q, k, v: (q, k[..., :8], v[..., :8]), "k must have shape"),
        (lambda q, k, v: (q, k[:, :, :20], v[:, :, :20]), "q must hold 1 to 20 rows"),
        (lambda q, k, v: (q[:, :, :30], k, v), "index must be built for"),
    ],
)
def test_bad_tensors_get_one_clear_error(change, message: str) -> None:  # noqa: ANN001
    q, k, v = random_qkv(4, 2, 70)
    index = dense_index(layout_of(q, k), 4)
    with pytest.raises(ValueError, match=message):
        sparse_attention(*change(q, k, v), index)


def test_bad_types_are_named() -> None:
    q, k, v = random_qkv(4, 2, 70)
    index = dense_index(layout_of(q, k), 4)
    with pytest.raises(TypeError, match="k must be a torch tensor, got list"):
        sparse_attention(q, k.tolist(), v, index)
    with pytest.raises(TypeError, match=r"index must be a SparseIndex, .* got NoneType"):
        sparse_attention(q, k, v, None)


def test_index_of_other_heads_is_refused() -> None:
    q, k, v = random_qkv(4, 2, 70)
    with pytest.raises(ValueError, match="4 query heads or 2 KV heads, got 3"):
        sparse_attention(q, k, v, dense_index(layout_of(q, k), 3))


def test_explicit_choice_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = random_qkv(4, 2, 70)
    index = dense_index(layout_of(q, k), 4)
    with pytest.raises(UnsupportedError, match="impl='hopper' cannot run here"):
        sparse_attention(q, k, v, index, impl="hopper")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UnsupportedError, match="Triton needs a GPU"):
        sparse_attention(q, k, v, index, impl="triton")
    with monkeypatch.context() as changed:
        changed.setenv("MINFERENCE_IMPL", "triton")
        with pytest.raises(UnsupportedError, match="MINFERENCE_IMPL=triton cannot run"):
            sparse_attention(q, k, v, index)
    with pytest.raises(UnsupportedError, match="impl='auto' can"):
        sparse_attention(q, k, v, index, impl="triton", precision="fp8")
    with pytest.raises(ValueError, match="valid names are auto"):
        sparse_attention(q, k, v, index, impl="cuda")
