"""The Hopper kernel against a masked softmax in float32, and what of it can be checked anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minference.errors import UnsupportedError
from minference.index import WHOLE, Ragged, SparseIndex, pack_bits
from minference.ops.attention import hopper
from minference.ops.attention.fp8 import E4M3, rounded_qkv
from minference.ops.attention.hopper.launch import tuned_build
from minference.ops.attention.hopper.tensor_map import describable

SHARED_LIMIT = 232448
KINDS = ("lines", "blocks", "band", "mixed")


def ragged(lists: list[list[list[list[int]]]], device: torch.device) -> Ragged:
    """Lists [batch][head][group] one after another; missing groups are empty."""
    shape = (len(lists), len(lists[0]), max(len(groups) for row in lists for groups in row))
    start, count = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int32)
    values: list[int] = []
    for b, row in enumerate(lists):
        for h, groups in enumerate(row):
            for g, entries in enumerate(groups):
                start[b, h, g], count[b, h, g] = len(values), len(entries)
                values += entries
    flat = torch.tensor(values or [0], dtype=torch.int32)
    return Ragged(flat.to(device), start.to(device), count.to(device))


def chosen(flags: torch.Tensor) -> list[int]:
    return flags.nonzero()[:, 0].tolist()


def random_index(
    heads: int,
    q_len: int,
    kv_len: int,
    pads: tuple[tuple[int, int], ...],
    device: torch.device,
) -> SparseIndex:
    """Heads of every kind by turns; `pads` holds left and right padding of each batch row."""
    slots, tiles = 2 * -(-kv_len // 128) + 2, q_len // 128 + 2
    batch, kinds = len(pads), [KINDS[h % len(KINDS)] for h in range(heads)]
    bits = torch.zeros(batch, heads, tiles, slots, dtype=torch.bool)
    lists: dict[str, list] = {"offsets": [], "blocks": [], "columns": []}
    for b, (left, _) in enumerate(pads):
        rows: dict[str, list] = {name: [] for name in lists}
        own_tile = max(kv_len - q_len - left, 0) // 128
        for h, kind in enumerate(kinds):
            groups = tiles if kind in ("blocks", "mixed") else 1
            offsets, blocks, columns = [], [], [[]]
            for g in range(groups):
                keep = torch.rand(slots) < {"lines": 0.3, "mixed": 0.3, "blocks": 0.0}.get(kind, 0)
                keep[: 5 if kind == "band" else 2] = kind != "blocks"
                bits[b, h, g] = keep
                offsets.append([x - 1 for x in chosen(keep)])
                halves = torch.randint(1, 4, (slots,)) * (torch.rand(slots) < 0.4)
                if kind == "blocks":
                    halves[2 * (own_tile + g) : 2 * (own_tile + g) + 2] = 3
                own = {"band": [3], "lines": []}
                blocks.append(own.get(kind, [4 * j + int(halves[j]) for j in chosen(halves)]))
            if kind == "lines":
                columns = [chosen(torch.rand(kv_len) < 0.3)]
            for name, entries in (("offsets", offsets), ("blocks", blocks), ("columns", columns)):
                rows[name].append(entries)
        for name, row in rows.items():
            lists[name].append(row)

    def ints(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    size = {"lines": WHOLE, "band": WHOLE, "blocks": 1, "mixed": 1}
    index = SparseIndex(
        *(ragged(lists[name], device) for name in ("offsets", "blocks", "columns")),
        offset_bits=pack_bits(bits).to(device),
        group_tiles=ints([size[kind] for kind in kinds]),
        window=ints([200 if kind == "band" else WHOLE for kind in kinds]),
        sink=ints([40 if kind == "band" else 0 for kind in kinds]),
        first=ints([left for left, _ in pads]),
        stop=ints([kv_len - right for _, right in pads]),
        q_len=q_len,
        kv_len=kv_len,
    )
    index.check()
    return index


def oracle(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked softmax in float32 and its log-sum-exp; rows without keys give 0 and -inf."""
    share = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(share, dim=1) for x in (k, v))
    scores = q.float() @ k.transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask.repeat_interleave(q.shape[1] // mask.shape[1], 1), -torch.inf)
    lse = scores.logsumexp(dim=-1)
    weights = torch.exp(scores - lse.clamp(min=-1e30)[..., None])
    return weights @ v, lse


SHAPES = [
    (4, 2, 1, 1, ((0, 0),)),
    (4, 4, 63, 63, ((0, 0),)),
    (4, 2, 65, 400, ((0, 0),)),
    (8, 2, 333, 333, ((0, 0), (0, 0))),
    (8, 4, 300, 1111, ((0, 0),)),
    (4, 2, 500, 500, ((37, 0), (0, 45), (130, 131))),
    (4, 2, 200, 700, ((100, 0), (570, 0))),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, E4M3])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("shared_lists", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "q_len", "kv_len", "pads"), SHAPES)
def test_hopper_matches_masked_softmax(
    heads: int,
    kv_heads: int,
    q_len: int,
    kv_len: int,
    pads: tuple[tuple[int, int], ...],
    shared_lists: bool,
    dim: int,
    dtype: torch.dtype,
    nan_poison: None,
) -> None:
    device = torch.device("cuda")
    if reason := hopper.why_not(device, dtype, dim):
        pytest.skip(reason)
    batch = len(pads)
    index = random_index(kv_heads if shared_lists else heads, q_len, kv_len, pads, device)
    fp8, given = dtype == E4M3, {"device": device, "dtype": dtype}
    if fp8:
        given["dtype"] = torch.bfloat16
    q = torch.randn(batch, q_len, heads, dim, **given).transpose(1, 2)
    k = torch.randn(batch, kv_heads, kv_len, dim, **given)
    v = torch.randn(batch, kv_len, kv_heads, dim, **given).transpose(1, 2)
    rounded = rounded_qkv(q, k, v, index) if fp8 else (q, k, v)
    mask = index.to_dense_mask()
    for softcap in (0.0, 20.0):
        expected, expected_lse = oracle(*rounded, mask, dim**-0.5, softcap)
        options = {"scale": dim**-0.5, "softcap": softcap, "fp8": fp8}
        out, lse = hopper.sparse_attention(q, k, v, index, return_lse=True, **options)
        again, none = hopper.sparse_attention(q, k, v, index, **options)
        assert none is None
        assert torch.equal(out, again)
        assert lse is not None
        torch.testing.assert_close(lse, expected_lse, atol=2e-3, rtol=1e-3)
        error = (out.float() - expected).norm() / expected.norm()
        # in e4m3 the weights are rounded, which the oracle's are not
        assert error < {torch.bfloat16: 4e-3, torch.float16: 1e-3, E4M3: 4e-2}[dtype]
        assert not out[torch.isneginf(expected_lse)].any()


def test_hopper_refuses_other_devices() -> None:
    q = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16)
    index = random_index(1, 64, 64, ((0, 0),), torch.device("cpu"))
    with pytest.raises(UnsupportedError, match=r"compute capability 9\.0"):
        hopper.sparse_attention(q, q, q, index, scale=0.125)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_block_fits_in_shared_memory(head_dim: int, fp8: bool) -> None:
    build = tuned_build(head_dim, torch.float16, fp8=fp8)
    assert build.shared_bytes <= SHARED_LIMIT
    assert f"-DHEAD_DIM={head_dim}" in build.options()
    assert f'-DELEMENT="{"e4m3" if fp8 else "f16"}"' in build.options()
    assert '-DOUTPUT="f16"' in build.options()


def test_describable_asks_for_aligned_strides() -> None:
    x = torch.zeros(2, 300, 4, 64, dtype=torch.bfloat16)
    assert describable(x)
    assert describable(x.transpose(1, 2))
    assert not describable(x.transpose(2, 3))
    assert not describable(x[..., 1:])
    assert not describable(torch.zeros(2, 4, 300, 68, dtype=torch.bfloat16)[..., :64][..., 4:])


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_kernel_compiles(
    head_dim: int, fp8: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minference.ops.attention.hopper.compile import compile_source, why_not_compile

    if reason := why_not_compile():
        pytest.skip(reason)
    monkeypatch.setenv("MINFERENCE_CACHE", str(tmp_path))
    options = tuned_build(head_dim, torch.bfloat16, softcap=True, fp8=fp8).options()
    code = compile_source("attention.cu", options)
    assert code[:4] == b"\x7fELF"
    assert [path.read_bytes() for path in (tmp_path / "hopper").iterdir()] == [code]
    assert compile_source("attention.cu", options) == code


def test_params_have_the_size_of_their_struct() -> None:
    from minference.ops.attention.hopper.launch import _params

    q, k = torch.zeros(1, 4, 64, 64), torch.zeros(1, 2, 64, 64)
    index = random_index(4, 64, 64, ((0, 0),), torch.device("cpu"))
    params = _params(q, k, index, torch.zeros(1), q, None, 0.125, 0.0)
    pointers_and_sizes, floats = 3 * 4 + 13 + 9, 2
    assert len(params) == 8 * pointers_and_sizes + 4 * floats
