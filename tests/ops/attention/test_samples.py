"""Samples that stand for left-out keys: the readable version against sums written out, Triton
against the readable version, and what they do to the output."""

import math
from dataclasses import replace

import pytest
import torch

from minference.index import BLOCK, TILE, Ragged, SparseIndex, real_bounds
from minference.index_samples import sample_keys, sample_stride
from minference.ops.attention.api import sparse_attention
from minference.ops.attention.paged import paged_sparse_attention
from minference.ops.build import Layout, assemble
from minference.testing import layout_of, random_qkv, tolerance

# Triton's interpreter turns one-element arrays into loop bounds
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

SAMPLES = 9
SHARE = 0.05


def listed(layout: Layout, heads: int, *, every: int = 5) -> SparseIndex:
    """Block 0, the two of the tile, and one of `every`."""
    tiles = layout.chunk_tiles
    begin = (layout.kv_len - layout.q_len - layout.first).clamp(min=0) // TILE
    tile = begin[:, None] + torch.arange(tiles, device=layout.device)
    block = torch.arange(2 * -(-layout.kv_len // TILE), device=layout.device)
    own = tile[..., None]
    flags = (block == 0) | (block // 2 == own) | ((block + own) % every == 0)
    flags &= block <= 2 * own + 1
    order = torch.where(flags, 4 * block + 3, 1 << 20).sort(dim=-1).values
    rows = torch.where(order < 1 << 20, order, 0)[:, None].expand(-1, heads, -1, -1)
    count = flags.sum(-1)[:, None].expand(-1, heads, -1)
    blocks = Ragged.from_rows(rows, count)
    samples = {"samples": SAMPLES, "sample_share": SHARE}
    return assemble(layout, heads, blocks=blocks, group_tiles=1, **samples)


def written_out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: SparseIndex, softcap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row by row in float64, from the definition."""
    mask = index.to_dense_mask()
    batch, heads, _, dim = q.shape
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float64)
    q, k, v = (x.double().cpu() for x in (q, k, v))
    for b in range(batch):
        first, shift = int(index.first[b]), index.query_start(b)
        for row in (position - shift for position in index.rows(b)):
            tile = (row + shift) // TILE
            stride = sample_stride(tile, index.samples)
            keys = first + sample_keys(tile, index.samples)
            for h in range(heads):
                own = mask[b, h * index.heads // heads, row].cpu()
                scores = k[b, h * k.shape[1] // heads] @ q[b, h, row] * dim**-0.5
                scores = softcap * (scores / softcap).tanh() if softcap else scores
                kept = scores[own].exp().sum()
                count = torch.where(own, 1.0, 0.0).double()
                for key in keys[~own[keys]].tolist():
                    most = max(1.0, index.sample_share * float(kept) / math.exp(scores[key]))
                    count[key] = min(stride, most)
                weights = torch.where(count > 0, count * scores.exp(), 0.0)
                out[b, h, row] = weights @ v[b, h * k.shape[1] // heads] / weights.sum()
                lse[b, h, row] = weights.sum().log()
    return out, lse


def impls(device: torch.device) -> list[str]:
    return ["triton"] if device.type == "cuda" else ["reference", "torch", "triton"]


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize(("q_len", "kv_len"), [(5, 5), (640, 640), (200, 601), (1, 900)])
def test_weights_are_those_of_the_definition(
    q_len: int, kv_len: int, softcap: float, device: torch.device
) -> None:
    q, k, v = random_qkv(4, 2, q_len, kv_len, dim=16, device=device)
    index = listed(layout_of(q, k), 2)
    index.check()
    expected, expected_lse = written_out(q, k, v, index, softcap)
    plain = sparse_attention(q, k, v, replace(index, samples=0), softcap=softcap, impl="torch")
    assert kv_len <= TILE or (plain.cpu() - expected).abs().max() > 0.01
    for impl in impls(device):
        out, lse = sparse_attention(q, k, v, index, softcap=softcap, return_lse=True, impl=impl)
        torch.testing.assert_close(out.cpu().double(), expected, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(lse.cpu().double(), expected_lse, atol=1e-4, rtol=1e-5)


def test_a_sample_that_matters_counts_at_most_as_a_share(device: torch.device) -> None:
    q, k, v = random_qkv(2, 1, 512, dim=16, device=device)
    index = listed(layout_of(q, k), 1)
    mask = index.to_dense_mask()[0, 0, 511].cpu()
    keys = sample_keys(3, SAMPLES)
    key = int(keys[~mask[keys]][0])
    lone = 5.0 * torch.nn.functional.normalize(q[0, 0, 511], dim=0)
    k[0, 0, key] = lone
    expected, _ = written_out(q, k, v, index, 0.0)
    assert float((lone @ q[0, 0, 511]) * 0.25) > 3
    for impl in impls(device):
        out = sparse_attention(q, k, v, index, impl=impl).cpu().double()
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [16, 80, 128, 256])
def test_triton_matches_in_every_head_dim(
    dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    q, k, v = random_qkv(2, 1, 130, 420, dim=dim, dtype=dtype, device=device)
    index = listed(layout_of(q, k), 2)
    expected = sparse_attention(q, k, v, index, impl="reference", return_lse=True)
    got = sparse_attention(q, k, v, index, impl="triton", return_lse=True)
    torch.testing.assert_close(got[0], expected[0], **tolerance(dtype))
    torch.testing.assert_close(got[1], expected[1], atol=2e-3, rtol=1e-3)


@pytest.mark.usefixtures("nan_poison")
def test_padding_is_neither_read_nor_written(device: torch.device) -> None:
    q, k, v = random_qkv(4, 2, 300, 500, batch=2, device=device)
    layout = layout_of(q, k, left_padding=(250, 0), right_padding=(0, 60))
    for x in (k, v):
        x[0, :, :250] = torch.nan
        x[1, :, -60:] = torch.nan
    index = listed(layout, 2)
    expected = sparse_attention(q, k, v, index, impl="reference")
    got = sparse_attention(q, k, v, index, impl="triton")
    assert bool(expected.isfinite().all())
    torch.testing.assert_close(got, expected, **tolerance(q.dtype))
    assert int(got[0, :, :50].count_nonzero()) == 0
    assert int(got[1, :, -60:].count_nonzero()) == 0


@pytest.mark.parametrize("cut", [1, 130, 511])
def test_chunks_give_the_rows_of_the_whole(cut: int, device: torch.device) -> None:
    q, k, v = random_qkv(2, 1, 640, device=device)
    whole = sparse_attention(q, k, v, listed(layout_of(q, k), 1))
    part = q[:, :, cut:]
    rows = sparse_attention(part, k, v, listed(layout_of(part, k), 1))
    torch.testing.assert_close(rows, whole[:, :, cut:], **tolerance(q.dtype))


def test_pages_are_read_in_place(device: torch.device) -> None:
    q, k, v = random_qkv(4, 2, 140, 600, device=device)
    index = listed(layout_of(q, k), 2)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:38].to(device)
    caches = []
    for x in (k, v):
        cache = torch.full((40, 16, 2, x.shape[-1]), torch.nan, device=device)
        rows = torch.nn.functional.pad(x[0].transpose(0, 1), (0, 0, 0, 0, 0, 8), value=torch.nan)
        cache[order] = rows.unflatten(0, (38, 16))
        caches.append(cache)
    expected = sparse_attention(q, k, v, index, impl="triton")
    for impl in ("triton",) if device.type == "cuda" else ("torch", "triton"):
        got = paged_sparse_attention(q, *caches, order.int()[None], index, impl=impl)
        torch.testing.assert_close(got, expected, **tolerance(q.dtype))


@pytest.mark.parametrize("samples", [1, (1 << 20) + 1])
def test_bad_counts_of_samples_are_refused(samples: int) -> None:
    first, stop = real_bounds(1, 1 << 17, "cpu")
    layout = Layout(first, stop, 1, 1 << 17)
    assert assemble(layout, 1, samples=2).samples == 2
    with pytest.raises(
        ValueError, match="samples must be 0 or 2 to 1048576 in a context of 131072"
    ):
        assemble(layout, 1, samples=samples)


def test_density_counts_samples_outside_the_blocks() -> None:
    q, k, _ = random_qkv(2, 1, 200, 640)
    index = listed(layout_of(q, k), 1)
    mask = index.to_dense_mask()[0, 0]
    pairs = 0
    for row in range(200):
        tile = (440 + row) // TILE
        own = replace(index, samples=0).tile_blocks(0, 0, tile)
        keys = sample_keys(tile, SAMPLES)
        pairs += int((own[keys // BLOCK] == 0).sum())
    causal = sum(range(441, 641))
    with_samples = index.head_density()
    without = replace(index, samples=0).head_density()
    assert float((with_samples - without)[0, 0]) == pytest.approx(pairs / causal)
    assert pairs > 0
    assert mask.any()


def test_diffuse_rows_come_nearer_to_dense() -> None:
    q, k, v = random_qkv(2, 1, 2048, dim=32)
    q, v = q * 0.2, 0.3 * v + torch.linspace(0, 3, 2048)[:, None]
    index = listed(layout_of(q, k), 1, every=1000)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )

    def error(samples: int) -> float:
        out = sparse_attention(q, k, v, replace(index, samples=samples))
        return float((out - dense)[:, :, 1024:].norm())

    assert error(64) < 0.3 * error(0)


def test_an_index_with_samples_is_checked() -> None:
    q, k, _ = random_qkv(2, 1, 300)
    index = listed(layout_of(q, k), 1)
    bad = replace(
        index,
        columns=Ragged.from_rows(torch.tensor([[[[70]]]]), torch.ones(1, 1, 1, dtype=torch.int32)),
    )
    with pytest.raises(ValueError, match=r"sample_share must be a share in \(0, 1\], got 0"):
        replace(index, sample_share=0.0).check()
    with pytest.raises(ValueError, match="with samples must have blocks only, got 1 columns"):
        bad.check()
    half = Ragged(index.blocks.values - 1, index.blocks.start, index.blocks.count)
    with pytest.raises(ValueError, match=r"both row halves, got blocks\[0, 0, 0\] = \[2, "):
        replace(index, blocks=half).check()
