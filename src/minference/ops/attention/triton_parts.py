"""Pieces that both attention kernels use: the softmax step, look-ups in the index, the output."""

import triton
import triton.language as tl

from minference.ops.attention.triton_fp8 import in_value_order

NEVER = tl.constexpr((1 << 31) - 1)
"""A position that no row reaches."""
UNMASKED = tl.constexpr(0)
ROWS_OF_KEY = tl.constexpr(1)
WHOLE_KEYS = tl.constexpr(2)
"""What hides scores of a step: nothing, each key from rows of its own, some keys from all rows."""
RAISED = tl.constexpr(8)
"""fp8 weights are multiplied by 2 to this power: what lies below 2^-17 of the largest is lost."""


@triton.constexpr_function
def tile_dim(head_dim: int) -> int:
    """`padded_dim` inside a kernel."""
    return max(16, triton.next_power_of_2(head_dim))


@triton.jit
def place_program(slots, H: tl.constexpr, HKV: tl.constexpr, PARTS: tl.constexpr):
    """Batch row, KV head, query head and rank among the head's `slots * PARTS` row pieces.

    KV head > rows, longest first > query head: programs that run together share K and V in L2.
    """
    SHARE: tl.constexpr = H // HKV
    turn = tl.program_id(0) // SHARE
    kv_head = turn // (slots * PARTS) % HKV
    head = kv_head * SHARE + tl.program_id(0) % SHARE
    return turn // (slots * PARTS * HKV), kv_head, head, slots * PARTS - 1 - turn % (slots * PARTS)


@triton.jit
def pages_of(table, b, PAGE: tl.constexpr):
    """The list of a sequence's pages; nothing where PAGE, the rows of a page, is 0."""
    pages = 0
    if PAGE != 0:
        pages = table[0] + b.to(tl.int64) * table[1]
    return pages


@triton.jit
def in_pages(pages, place, end, PAGE: tl.constexpr):
    """Page and row in it of the rows `place` of a sequence, each [ROWS, 1] and int64; nothing
    where PAGE is 0. Entries past the context may hold anything, and are not read."""
    page = 0
    row = 0
    if PAGE != 0:
        there = (place >= 0) & (place < end)
        page = tl.load(pages + place // PAGE, mask=there, other=0).to(tl.int64)[:, None]
        row = (place % PAGE).to(tl.int64)[:, None]
    return page, row


@triton.jit
def rows_at(place, paged, step, page_step, PAGE: tl.constexpr):
    """Where rows begin, in elements: at their int64 `place`, or where `in_pages` found them."""
    at = place * step
    if PAGE != 0:
        page, row = paged
        at = page * page_step + row * step
    return at


@triton.jit
def attend(
    q, k, v, acc, peak, total, scaling, pos, opens, closes, MASK: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax in base 2. With MASK ROWS_OF_KEY, row `pos` sees key n iff
    opens[n] <= pos < closes[n]; with WHOLE_KEYS all rows see key n iff opens[n] is not 0. With
    PRECISION "fp8", v lies in the order of `value_key`."""
    factor, ceiling = scaling
    INPUT: tl.constexpr = "tf32" if PRECISION == "fp8" else PRECISION
    scores = tl.dot(q, k.T, input_precision=INPUT)  # [ROWS, keys]
    if SOFTCAP:
        scores = ceiling - 2 * ceiling / (tl.exp2(scores * factor) + 1)
        factor = 1.0
    if MASK == ROWS_OF_KEY:
        seen = (opens[None, :] <= pos[:, None]) & (pos[:, None] < closes[None, :])
        scores = tl.where(seen, scores, float("-inf"))
    if MASK == WHOLE_KEYS:
        scores = tl.where(opens[None, :] != 0, scores, float("-inf"))
    risen = tl.maximum(peak, tl.max(scores, 1) * factor)
    safe = risen
    if MASK != UNMASKED:
        # a row that has seen no key yet would give inf - inf
        safe = tl.where(risen == float("-inf"), 0.0, risen)
    fade = tl.exp2(peak - safe)
    if PRECISION == "fp8":
        weights = tl.exp2(scores * factor - (safe - RAISED)[:, None])
        total = total * fade + tl.sum(weights, 1)
        # the tensor cores' own sums keep some 14 bits: each step's is added in float32
        KEYS: tl.constexpr = v.shape[0]
        weights = in_value_order(weights.to(v.dtype))
        acc = tl.dot(weights, v, acc * fade[:, None], max_num_imprecise_acc=KEYS)
    else:
        weights = tl.exp2(scores * factor - safe[:, None])
        total = total * fade + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return acc, risen, total


@triton.jit
def closes_at(key, window, sink):
    """First row position that no longer sees the key."""
    return tl.where(key < sink, NEVER, key + window)


@triton.jit
def list_of(lists, item, group):
    """Pointer, start and length of a group's list; a kind with fewer groups lacks the others."""
    values, starts, counts, groups = lists
    here = group < groups
    at = item * groups + group
    start = tl.load(starts + at, mask=here, other=0)
    return values + start, start, tl.load(counts + at, mask=here, other=0)


@triton.jit
def bitmap_of(bits, item, group):
    """Pointer and length in words of a group's offset bitmap."""
    ptr, groups, words = bits
    return ptr + (item * groups + group) * words, tl.where(group < groups, words, 0)


@triton.jit
def covered(bitmap, offset):
    """Whether each offset is in the bitmap, 0 or 1."""
    ptr, words = bitmap
    slot = offset + 1
    word = tl.load(ptr + (slot >> 5), mask=(slot >= 0) & ((slot >> 5) < words), other=0)
    return (word >> (slot & 31)) & 1


@triton.jit
def uncovered_bits(columns, begin, n, bitmap, tile, STEPS: tl.constexpr, WIDE: tl.constexpr):
    """Which of the columns [begin, begin + STEPS * WIDE) no offset covers: bits, [STEPS, 4].

    Bit 2 j + e of word t is for column 8 j + 2 t + e of a step: those of one thread, as the tensor
    cores lay scores out, so that a thread needs one word a step.
    """
    place = begin + tl.arange(0, STEPS * WIDE)
    key = tl.load(columns + place, mask=place < n, other=0)
    there = (place < n) & (covered(bitmap, 2 * tile - (key >> 6)) == 0)
    bits = tl.where(there, 1 << bit_of(place % WIDE), 0)
    return tl.sum(tl.sum(bits.reshape(STEPS, WIDE // 8, 4, 2), 3), 1)


@triton.jit
def bit_of(column):
    """The bit of a step's column in its word of `uncovered_bits`."""
    return column // 8 * 2 + column % 2


@triton.jit
def bits_of_step(words, begin, STEPS: tl.constexpr, WIDE: tl.constexpr, KEYS: tl.constexpr):
    """The columns [begin, begin + KEYS) of `uncovered_bits`, 0 where an offset covers them; KEYS
    divides WIDE and `begin`. [KEYS]"""
    step = begin // WIDE
    own = tl.sum(tl.where(tl.arange(0, STEPS)[:, None] == step, words, 0), 0)  # [4]
    if KEYS < WIDE:
        own >>= begin % WIDE // 4
    own = tl.broadcast_to(own[None, :, None], (KEYS // 8, 4, 2)).reshape(KEYS)
    return own & (1 << bit_of(tl.arange(0, KEYS)))


@triton.jit
def store_tile(
    out_ptr, lse_ptr, at, acc, peak, total, inside, wanted, D: tl.constexpr, LSE: tl.constexpr,
    RAISE: tl.constexpr = 0,
):  # fmt: skip
    """Write rows `at` of the output and its log-sum-exp: 0 and -inf where no key was seen. A sum
    that is no number is stored.

    Weights came in multiplied by 2^RAISE.
    """
    column = tl.arange(0, acc.shape[1])
    seen = wanted & (total != 0)
    mass = tl.where(seen, total, 1.0)
    out = tl.where(seen[:, None], acc / mass[:, None], 0.0)
    to = out_ptr + at[:, None] * D + column[None, :]
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (column < D)[None, :])
    if LSE:
        # log2 to the natural logarithm
        lse = tl.where(seen, (peak - RAISE + tl.log2(mass)) * 0.6931471805599453, float("-inf"))
        tl.store(lse_ptr + at, lse, mask=inside)
