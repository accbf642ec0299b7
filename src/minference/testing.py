"""Public helpers for tests and benchmarks: inputs with planted patterns, indices of every kind,
tolerances, a tiny model, and the checks that every method passes."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from minference.index import BLOCK, TILE, Ragged, SparseIndex, merge_heads, real_bounds
from minference.methods.base import Context, Method
from minference.ops._dispatch import default_device as default_device
from minference.ops.attention.api import check_index, sparse_attention
from minference.ops.build import Layout, a_shape_index, assemble, dense_index
from minference.ops.select.lists import columns_from_positions, lines_to_offsets

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOLERANCE = {
    torch.float32: 2e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
    torch.float8_e4m3fn: 1e-1,
}
PADDING = 150
"""Places of padding in the checks of a method: a whole tile and a part of a block."""


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Absolute and relative tolerance for attention outputs of standard-normal values."""
    return {"atol": _TOLERANCE[dtype], "rtol": _TOLERANCE[dtype]}


def layout_of(
    q: Tensor, k: Tensor, *, left_padding: tuple[int, ...] = (), right_padding: tuple[int, ...] = ()
) -> Layout:
    """The layout of buffers whose batch row b starts and ends with that many padding places."""
    batch, kv_len = k.shape[0], k.shape[2]
    left, right = (x or (0,) * batch for x in (left_padding, right_padding))
    places = torch.arange(kv_len, device=k.device)
    keep = torch.stack(
        [(places >= a) & (places < kv_len - z) for a, z in zip(left, right, strict=True)]
    )
    first, stop = real_bounds(batch, kv_len, k.device, keep)
    return Layout(first, stop, q.shape[2], kv_len)


def random_qkv(
    heads: int = 4,
    kv_heads: int = 2,
    q_len: int = 300,
    kv_len: int | None = None,
    *,
    batch: int = 1,
    dim: int = 32,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Standard-normal q [batch, heads, q_len, dim] and k, v [batch, kv_heads, kv_len, dim]."""
    generator = torch.Generator().manual_seed(seed)
    kv_len = q_len if kv_len is None else kv_len
    shapes = ((batch, heads, q_len, dim), *[(batch, kv_heads, kv_len, dim)] * 2)
    q, k, v = (torch.randn(s, generator=generator).to(device, dtype) for s in shapes)
    return q, k, v


@dataclass(frozen=True)
class Lines:
    """Columns and distances of one head."""

    columns: Int[Tensor, " nv"]
    distances: Int[Tensor, " ns"]


def random_lines(
    length: int,
    *,
    columns: int,
    clusters: int,
    width: int,
    band: int,
    seed: int = 0,
) -> Lines:
    """Scattered columns; a local band, and clusters of distances that start in [band, length/2)."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(length, generator=generator)[:columns].sort().values
    low, high = min(band, length - 1), max(length // 2, band + 1)
    starts = torch.randint(low, high, (clusters,), generator=generator)
    distances = torch.cat([torch.arange(band), (starts[:, None] + torch.arange(width)).flatten()])
    return Lines(chosen, distances[distances < length].unique())


def _rotations(positions: Tensor, dim: int) -> Float[Tensor, "P dim"]:
    """Sines and cosines whose inner product over two positions peaks where they are equal."""
    rates = torch.logspace(
        math.log10(math.pi), -5, dim // 2, dtype=torch.float64, device=positions.device
    )
    angle = positions.double()[:, None] * rates
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float() / math.sqrt(dim // 2)


def planted_qkv(
    lines: list[Lines],
    length: int,
    *,
    kv_heads: int,
    dim: int = 64,
    strength: float = 10.0,
    noise: float = 0.3,
    rows: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs whose head h attends to the columns and distances of `lines[h]`.

    All heads of a KV head see its keys, so a group's columns are the union over its heads.
    `strength` is the score of a line's keys (before the softmax) above the rest; `noise` the
    standard deviation of the scores of all keys; `rows` keeps so many of the last queries only.
    """
    generator = torch.Generator(device).manual_seed(seed)
    group = len(lines) // kv_heads
    places = torch.arange(length, device=device)
    asking = places if rows is None else places[-rows:]
    half = dim // 2
    rotary = _rotations(places, half)
    shapes = ((len(lines), len(asking), dim), *[(kv_heads, length, dim)] * 2)
    q, k, v = (torch.randn((1, *s), generator=generator, device=device) for s in shapes)
    q *= math.sqrt(noise)
    k *= math.sqrt(noise)
    gain = math.sqrt(strength * math.sqrt(dim))
    for h, own in enumerate(lines):
        starts = own.distances[:: max(1, len(own.distances) // 16)]
        for distance in starts.tolist():
            q[0, h, :, half:] += gain * _rotations(asking - distance, half)
        q[0, h, :, 0] = gain
        k[0, h // group, own.columns.to(device), 0] = gain
    for kv_head in range(kv_heads):
        k[0, kv_head, :, half:] += gain * rotary
    return q.to(dtype), k.to(dtype), v.to(dtype)


def mixed_index(layout: Layout, heads: int, *, seed: int = 0) -> SparseIndex:
    """Lines, an A-shape, block lists a tile, everything, and grouped offsets with blocks: heads
    take these kinds in turn, with random parameters."""
    generator = torch.Generator().manual_seed(seed)
    kinds = (_random_lines, _random_a_shape, _random_blocks, _everything, _random_groups)
    parts = [([h], kinds[h % len(kinds)](layout, generator)) for h in range(heads)]
    return merge_heads(parts, heads)


def _random(layout: Layout, generator: torch.Generator, *shape: int, high: int) -> Tensor:
    return torch.randint(0, max(high, 1), shape, generator=generator).to(layout.device)


def _random_lines(layout: Layout, generator: torch.Generator) -> SparseIndex:
    shape = (layout.batch, 1, max(1, layout.kv_len // 9))
    columns = _random(layout, generator, *shape, high=layout.kv_len)
    slashes = _random(layout, generator, layout.batch, 1, 3, high=layout.kv_len)
    offsets = lines_to_offsets(slashes, layout.kv_len)
    return assemble(
        layout, 1, offsets=offsets, columns=columns_from_positions(columns, layout.kv_len)
    )


def _random_a_shape(layout: Layout, generator: torch.Generator) -> SparseIndex:
    sink, window = _random(layout, generator, 2, high=layout.kv_len // 2 + 1).tolist()
    return a_shape_index(layout, (sink,), (window + 1,))


def _everything(layout: Layout, generator: torch.Generator) -> SparseIndex:
    return dense_index(layout, 1)


def _random_entries(
    layout: Layout, generator: torch.Generator, groups: int, *, halves: bool
) -> Ragged:
    """Random block entries; block 0 always, in both halves."""
    blocks = layout.blocks
    shape = (layout.batch, 1, groups, blocks)
    bits = torch.randint(0, 4, shape, generator=generator)
    bits = (bits if halves else 3 * (bits == 0)).to(layout.device)
    bits[..., 0] = 3
    place = torch.where(bits > 0, (bits > 0).cumsum(dim=-1) - 1, blocks)
    rows = torch.zeros((*shape[:3], blocks + 1), dtype=torch.int64, device=layout.device)
    rows.scatter_(-1, place, 4 * torch.arange(blocks, device=layout.device) + bits)
    return Ragged.from_rows(rows[..., :blocks], (bits > 0).sum(dim=-1))


def _random_blocks(layout: Layout, generator: torch.Generator) -> SparseIndex:
    entries = _random_entries(layout, generator, layout.chunk_tiles, halves=True)
    return assemble(layout, 1, blocks=entries, group_tiles=1)


def _random_groups(layout: Layout, generator: torch.Generator) -> SparseIndex:
    groups = layout.chunk_tiles // 2 + 1
    slashes = _random(layout, generator, layout.batch, groups, 2, high=layout.kv_len)
    offsets, bits = lines_to_offsets(slashes, layout.kv_len)
    by_group = Ragged(offsets.values, offsets.start.transpose(1, 2), offsets.count.transpose(1, 2))
    entries = _random_entries(layout, generator, groups, halves=False)
    return assemble(
        layout,
        1,
        offsets=(by_group, bits.transpose(1, 2).contiguous()),
        blocks=entries,
        group_tiles=2,
    )


def tiny_model(model_type: str = "llama", *, seed: int = 0, **options: object) -> "PreTrainedModel":
    """A random causal language model of a transformers family: 4 layers, 4 query heads, 2 KV heads
    of 16, vocabulary 320, weights large enough that attention matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    fields: dict[str, object] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "initializer_range": 0.2,
        "pad_token_id": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    config = AutoConfig.for_model(model_type, **fields | options)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def lines_mask(
    columns: Int[Tensor, " nv"], distances: Int[Tensor, " ns"], q_len: int, kv_len: int
) -> Bool[Tensor, "L N"]:
    """What the last `q_len` queries see of so many keys, given columns and distances: the columns,
    and each block of 64 keys that a distance, or distance 0, passes through for a tile of 128
    queries."""
    begin = (kv_len - q_len) // TILE * TILE
    size = -(-kv_len // TILE) * TILE
    distance = torch.arange(begin, size)[:, None] - torch.arange(size)
    named = torch.zeros(size, dtype=torch.bool)
    named[distances] = named[0] = True
    on_line = named[distance.clamp(min=0)] & (distance >= 0)
    blocks = on_line.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, TILE)).any(dim=3).any(dim=1)
    mask = blocks.repeat_interleave(TILE, 0).repeat_interleave(BLOCK, 1)
    mask[:, columns] = True
    return (mask & (distance >= 0))[kv_len - q_len - begin :][:q_len, :kv_len]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Bool[Tensor, "B h L N"]) -> Tensor:
    """Dense attention under a mask of 1, Hkv or H heads; rows that see nothing give 0."""
    heads = q.shape[1]
    k, v, mask = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v, mask))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).nan_to_num()


def context_for(layout: Layout, heads: int, *, layer: int = 0, dim: int = 32) -> Context:
    """The context that an integration would hand to a method for such a call."""
    return Context(layout=layout, layer=layer, heads=tuple(range(heads)), scale=dim**-0.5)


def check_method(
    method: Method, *, heads: int = 4, kv_heads: int = 2, length: int = 500, layers: int = 2
) -> None:
    """Raise unless the method keeps what every method must keep.

    The index fits q and k; it is causal; every real row sees itself and position 0; nothing reads
    padding; the same call gives the same index; batch rows do not see one another; padding at
    either end changes nothing; chunks that start anywhere are served; attention over the index, but
    for its samples, is dense attention under its mask. All this at `length` tokens in each of the
    first `layers` layers, and at 300, 65 and 1 in the first.

    Raises:
        AssertionError: the index does not keep one of these.
        ValueError: it was built for other heads or lengths, or its lists are not well formed.
    """
    cases = [(length, layer) for layer in range(layers)] + [(size, 0) for size in (300, 65, 1)]
    for size, layer in cases:
        q, k, v = random_qkv(heads, kv_heads, size, batch=2)
        where = f"at {size} tokens in layer {layer}"
        # first, since it copies what a method could write to
        _check_attention(method, q, k, v, layer, where)
        _check_prompt(method, q, k, layer, where)
        _check_chunks(method, q, k, layer, where)


def _check_prompt(method: Method, q: Tensor, k: Tensor, layer: int, where: str) -> None:
    length = q.shape[2]
    alone = _index(method, q[:1], k[:1], layer).to_dense_mask()
    rows = torch.arange(length)
    assert not bool(alone.triu(1).any()), f"the index is not causal {where}"
    assert bool(alone[..., rows, rows].all()), f"a row does not see itself {where}"
    assert bool(alone[..., 0].all()), f"a row does not see position 0 {where}"
    again = _index(method, q[:1], k[:1], layer).to_dense_mask()
    assert torch.equal(again, alone), f"two equal calls differ {where}"
    pair = _index(method, q, k, layer).to_dense_mask()
    assert torch.equal(pair[:1], alone), f"a batch row depends on another {where}"
    for side, left, right in (("left", PADDING, 0), ("right", 0, PADDING)):
        padded_q, padded_k = (_pad(x[:1], left, right) for x in (q, k))
        padded = _index(method, padded_q, padded_k, layer, (left,), (right,)).to_dense_mask()
        real = padded[..., left : left + length, left : left + length]
        assert torch.equal(real, alone), f"{side} padding changes the index {where}"
        assert int(padded.sum()) == int(real.sum()), f"{side} padding is attended to {where}"


def _check_chunks(method: Method, q: Tensor, k: Tensor, layer: int, where: str) -> None:
    length = q.shape[2]
    for rows in (rows for rows in (1, 129, length - 1) if 0 < rows < length):
        chunk = _index(method, q[:1, :, -rows:], k[:1], layer).to_dense_mask()
        before = length - rows
        own = torch.arange(rows)
        assert not bool(chunk.triu(1 + before).any()), f"a chunk is not causal {where}"
        assert bool(chunk[..., own, before + own].all()), (
            f"a chunk's row does not see itself {where}"
        )


def _check_attention(
    method: Method, q: Tensor, k: Tensor, v: Tensor, layer: int, where: str
) -> None:
    q, k, v = (torch.cat([_pad(x[:1], PADDING, 0), _pad(x[1:], 0, PADDING)]) for x in (q, k, v))
    seen_q, seen_k = q.clone(), k.clone()
    index = replace(_index(method, seen_q, seen_k, layer, (PADDING, 0), (0, PADDING)), samples=0)
    bound = tolerance(q.dtype)
    torch.testing.assert_close(
        sparse_attention(seen_q, seen_k, v, index, impl="torch"),
        masked_attention(q, k, v, index.to_dense_mask()),
        atol=bound["atol"],
        rtol=bound["rtol"],
        msg=lambda told: f"attention is not that under the index's mask {where}: {told}",
    )


def _pad(x: Tensor, left: int, right: int) -> Tensor:
    return pad(x, (0, 0, left, right), value=9.0)


def _index(
    method: Method,
    q: Tensor,
    k: Tensor,
    layer: int,
    left_padding: tuple[int, ...] = (),
    right_padding: tuple[int, ...] = (),
) -> SparseIndex:
    layout = layout_of(q, k, left_padding=left_padding, right_padding=right_padding)
    context = context_for(layout, q.shape[1], layer=layer, dim=q.shape[-1])
    index = method.build_index(q, k, context)
    if index is None:
        return dense_index(layout, q.shape[1])
    check_index(q, k, index)
    index.check()
    return index
