"""What the attention kernel derives from an index on the GPU before it starts: which listed
offsets are neighbours, so that two blocks load as one, and the packed rows of the columns."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from minference.index import Ragged, SparseIndex
from minference.ops._kernel import kernel
from minference.ops.attention.triton_parts import in_pages, pages_of, rows_at

CHUNK = 1024
PACK_ROWS = 64
PACK_PROGRAMS = 16


@triton.jit
def count_below(ptr, n, bound, step: tl.constexpr = 1):
    """Number of entries below `bound` of an ascending list: `ptr`, `ptr + step`, ... (n entries).

    Searches 256 ways, so that a list of 64K entries costs two dependent loads.
    """
    WAYS: tl.constexpr = 256
    low = n * 0
    left = n
    while left > 0:
        stride = (left + WAYS - 1) // WAYS
        place = tl.arange(0, WAYS) * stride
        value = tl.load(ptr + (low + place) * step, mask=place < left, other=0)
        below = tl.sum(((place < left) & (value < bound)).to(tl.int32))
        if below == 0:
            left = n * 0
        else:
            # entries up to the last pivot below the bound are below it; look at those after it
            skipped = (below - 1) * stride + 1
            low += skipped
            left = tl.minimum(left - skipped, stride - 1)
    return low


@triton.jit
def _later(a, b):
    return tl.maximum(a, b)


@kernel
def _pair_offsets(
    values_ptr, start_ptr, count_ptr, place_ptr, steps_ptr, plan_ptr, capacity, CHUNK: tl.constexpr
):
    item = tl.program_id(0).to(tl.int64)
    source = values_ptr + tl.load(start_ptr + item)
    n = tl.load(count_ptr + item)
    place = tl.load(place_ptr + item)
    fits = place + n <= capacity
    steps = steps_ptr + place
    pairs = n * 0
    singles = n * 0
    local = n
    run_start = n * 0
    limit = tl.where(fits, n, 0)
    for begin in range(0, n, CHUNK):
        at = begin + tl.arange(0, CHUNK)
        value = tl.load(source + at, mask=at < n, other=-2)
        previous = tl.load(source + at - 1, mask=(at > 0) & (at < n), other=-2)
        following = tl.load(source + at + 1, mask=at + 1 < n, other=-2)
        local = tl.minimum(local, tl.min(tl.where((at < n) & (value != at - 1), at, n)))
        # runs of neighbours, cut before offset 1: the diagonal blocks are a step of their own
        opens = (value != previous + 1) | (value == 1)
        opened = tl.associative_scan(tl.where(opens, at, run_start), 0, _later)
        usable = (at < limit) & (value >= 1)
        even = (at - opened) % 2 == 0
        low = usable & even & (following == value + 1)
        alone = usable & even & (following != value + 1)
        tl.store(steps + pairs + tl.cumsum(low.to(tl.int32), 0) - 1, value, mask=low)
        back = n - 1 - singles - (tl.cumsum(alone.to(tl.int32), 0) - 1)
        tl.store(steps + back, value, mask=alone)
        pairs += tl.sum(low.to(tl.int32))
        singles += tl.sum(alone.to(tl.int32))
        run_start = tl.max(opened)
    tl.store(plan_ptr + item * 4, pairs)
    tl.store(plan_ptr + item * 4 + 1, singles)
    tl.store(plan_ptr + item * 4 + 2, local)
    tl.store(plan_ptr + item * 4 + 3, fits.to(tl.int32))


def pair_offsets(
    offsets: Ragged,
) -> tuple[Int[Tensor, " capacity"], Int[Tensor, "B H G"], Int[Tensor, "B H G 4"]]:
    """Split each list into pairs of neighbouring offsets and single ones, without a host read.

    Returns:
        steps, place and plan: list [b, h, g] with n entries owns `steps[place : place + n]`, the
        lower offsets of its pairs from the front and its singles from the back, both ascending
        away from their end. plan holds the number of pairs, of singles, of leading entries that
        are -1, 0, 1, ... and whether the list was split at all: lists that share memory can
        outgrow `steps`, and such a list has no pairs and no singles.
    """
    count = offsets.count.contiguous()
    place = count.flatten().cumsum(0) - count.flatten()
    steps = torch.empty_like(offsets.values)
    plan = torch.empty((*count.shape, 4), dtype=torch.int32, device=count.device)
    _pair_offsets[(count.numel(),)](
        offsets.values, offsets.start.contiguous(), count, place, steps, plan, steps.numel(), CHUNK
    )
    return steps, place.view(count.shape), plan


@kernel
def _pack(
    k_ptr, v_ptr, packed_k_ptr, packed_v_ptr, values_ptr, start_ptr, count_ptr, first_ptr, stop_ptr,
    k_batch, k_head, k_row, v_batch, v_head, v_row, heads, kv_heads, PROGRAMS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr, table,
):  # fmt: skip
    item = tl.program_id(1)
    b = (item // heads).to(tl.int64)
    kv_head = ((item % heads) * kv_heads // heads).to(tl.int64)
    start = tl.load(start_ptr + item).to(tl.int64)
    n = tl.load(count_ptr + item)
    first = tl.load(first_ptr + b)
    real = tl.load(stop_ptr + b) - first
    column = tl.arange(0, BLOCK_D)
    pages = pages_of(table, b, PAGE)
    for begin in range(tl.program_id(0) * ROWS, n, PROGRAMS * ROWS):
        at = begin + tl.arange(0, ROWS)
        key = tl.load(values_ptr + start + at, mask=at < n, other=-1)
        row = (first + key).to(tl.int64)[:, None]  # [ROWS, 1]
        paged = in_pages(pages, first + key, first + real, PAGE)
        known = ((key >= 0) & (key < real))[:, None] & (column < D)[None, :]
        to = (start + at).to(tl.int64)[:, None] * D + column[None, :]  # [ROWS, BLOCK_D]
        kept = (at < n)[:, None] & (column < D)[None, :]
        # with pages, the first step is that from page to page
        k_own = k_ptr
        if PAGE == 0:
            k_own = k_ptr + b * k_batch
        k_at = rows_at(row, paged, k_row, k_batch, PAGE)
        k_from = k_own + kv_head * k_head + k_at + column[None, :]
        tl.store(packed_k_ptr + to, tl.load(k_from, mask=known, other=0.0), mask=kept)
        v_own = v_ptr
        if PAGE == 0:
            v_own = v_ptr + b * v_batch
        v_at = rows_at(row, paged, v_row, v_batch, PAGE)
        v_from = v_own + kv_head * v_head + v_at + column[None, :]
        tl.store(packed_v_ptr + to, tl.load(v_from, mask=known, other=0.0), mask=kept)


def pack_columns(
    k: Float[Tensor, "rows Hkv N D"],
    v: Float[Tensor, "rows Hkv N D"],
    index: SparseIndex,
    table: Int[Tensor, "B pages"] | None = None,
) -> tuple[Float[Tensor, "total D"], Float[Tensor, "total D"]]:
    """Rows of K and V at the index's columns, in the order of `columns.values`.

    With a table of pages, k and v are [pages, Hkv, page size, D].
    Places that no list uses hold zeros, so that a tile may read past a list's end.
    """
    columns, dim = index.columns, k.shape[3]
    # TMA has no tensors without rows
    packed_k = k.new_zeros((max(1, columns.values.numel()), dim))
    packed_v = torch.zeros_like(packed_k)
    _pack[(PACK_PROGRAMS, index.batch * index.heads)](
        k, v, packed_k, packed_v, columns.values, columns.start.contiguous(),
        columns.count.contiguous(), index.first, index.stop, *k.stride()[:3], *v.stride()[:3],
        index.heads, k.shape[1], PACK_PROGRAMS, dim, triton.next_power_of_2(dim), PACK_ROWS,
        0 if table is None else k.shape[2], None if table is None else (table, table.stride(0)),
    )  # fmt: skip
    return packed_k, packed_v
