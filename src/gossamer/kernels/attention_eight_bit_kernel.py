"""Attention whose products are in int8 and in e4m3, for Hopper's tensor cores: tiles, warps and the ring between them.

A program works through tiles of 192 queries of one head. One warp loads; each of three warpgroups has 64 queries of its
own (`attention_eight_bit_step`), so that some take exponentials while others multiply. Channels of v are stored so that
a thread ends up with 8 neighbours of the result, which it writes at once.

Tiles that are left for the last round, fewer than there are programs, are cut anew into tiles of 128 queries where that
still is a round: two warpgroups on more multiprocessors are sooner done than three on few. The third lets it pass by.

Ring. Step i of a tile has k of block i and v of block i - 1 in one slot (no v in step 0, no k in the last), because
they are multiplied one after the other. Blocks run from the last to the first: only the first step may need a mask.
Steps are counted through all tiles of a program: step n has slot n % SLOTS, and uses it for the (n // SLOTS)-th time.

Barriers, each completing one phase a use of what it guards:

    full[slot]       loaded: the loader announces the bytes, the copy engine counts them down
    empty[slot]      read: each warpgroup arrives once, behind its last product that reads the slot
    q_full[group]    the queries of a tile are loaded
    q_empty[group]   and read

Who reads waits for the parity of its use. Who writes waits for the opposite: a barrier that has completed nothing
answers to parity 1 at once, so the first use of a slot waits for nobody.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from gossamer.kernels.attention_eight_bit_step import (
    HEAD,
    ROWS,
    accumulator,
    last_probabilities,
    masked,
    operand,
    regrouped,
    row_scaled,
    scores,
    step,
    with_values,
)

GROUPS, NARROW_GROUPS = gl.constexpr(3), gl.constexpr(2)  # warpgroups that multiply, in a wide and in a narrow tile
Q_BYTES = gl.constexpr(64 * 128)  # queries of a warpgroup
GROUP_REGISTERS, LOADER_REGISTERS = gl.constexpr(160), gl.constexpr(24)  # of a thread; the first group takes the rest


@gluon.jit
def place(tile: gl.tensor, tiles: gl.tensor, wide: gl.tensor, heads: gl.tensor) -> gl.tuple:
    """Batch, head and first query of a tile; `tiles` wide ones a head, of which the first `wide` are that."""
    is_wide = tile < wide
    index = gl.where(is_wide, tile, tile + wide // 2)  # two wide tiles are three narrow ones
    each = gl.where(is_wide, tiles, tiles + tiles // 2)
    head = index // each
    return head // heads, head % heads, index % each * gl.where(is_wide, GROUPS * ROWS, NARROW_GROUPS * ROWS)


# the loader -----------------------------------------------------------------------------------------------------------


@gluon.jit
def load_queries(
    q_desc: gl.tensor,
    q: gl.shared_memory_descriptor,
    q_full: gl.shared_memory_descriptor,
    q_empty: gl.shared_memory_descriptor,
    batch: gl.tensor,
    head: gl.tensor,
    row: gl.tensor,
    odd: gl.tensor,
) -> None:
    """Queries of a tile for each warpgroup; `odd` is 1 for every second tile of the program."""
    for group in gl.static_range(GROUPS):
        mbarrier.wait(q_empty.index(group), odd ^ 1)
        mbarrier.expect(q_full.index(group), Q_BYTES)
        query = row + group * ROWS
        tma.async_copy_global_to_shared(q_desc, [batch, head, query, 0], q_full.index(group), q.index(group))


@gluon.jit
def load(
    q_desc: gl.tensor,
    k_desc: gl.tensor,
    v_desc: gl.tensor,
    ring: gl.tuple,
    queries: gl.tuple,
    heads: gl.tensor,
    tiles: gl.tensor,
    wide: gl.tensor,
    total: gl.tensor,
    blocks: gl.tensor,
    KEYS: gl.constexpr,
    SLOTS: gl.constexpr,
) -> None:
    """The loading warp: queries of every tile, then its steps."""
    k, v, full, empty = ring
    q, q_full, q_empty = queries
    n = 0
    odd = 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        batch, head, row = place(tile, tiles, wide, heads)
        load_queries(q_desc, q, q_full, q_empty, batch, head, row, odd)
        channel = (batch * heads + head) * HEAD
        for i in range(blocks + 1):
            slot = n % SLOTS
            arrived = full.index(slot)
            mbarrier.wait(empty.index(slot), (n // SLOTS & 1) ^ 1)
            if i == 0 or i == blocks:
                mbarrier.expect(arrived, KEYS * HEAD)
            else:
                mbarrier.expect(arrived, KEYS * HEAD * 2)
            key = (blocks - 1 - i) * KEYS
            tma.async_copy_global_to_shared(k_desc, [batch, head, key, 0], arrived, k.index(slot), pred=i < blocks)
            tma.async_copy_global_to_shared(v_desc, [channel, key + KEYS], arrived, v.index(slot), pred=i > 0)
            n += 1
        odd = odd ^ 1


# a warpgroup ----------------------------------------------------------------------------------------------------------


@gluon.jit
def pass_by(
    full: gl.shared_memory_descriptor,
    empty: gl.shared_memory_descriptor,
    n: gl.tensor,
    steps: gl.tensor,
    SLOTS: gl.constexpr,
) -> None:
    """Let so many steps from n on go by, unread."""
    for i in range(n, n + steps):
        slot = i % SLOTS
        mbarrier.wait(full.index(slot), i // SLOTS & 1)
        mbarrier.arrive(empty.index(slot))


@gluon.jit
def load_scales(scales: gl.tensor, row: gl.tensor, tokens: gl.tensor, KEYS: gl.constexpr) -> gl.tensor:
    """Scales (64,) of the queries from `row` on, as rows of scores lie."""
    query = row + gl.arange(0, ROWS, gl.SliceLayout(1, accumulator(KEYS, 32)))
    return gl.load(scales + query, mask=query < tokens, other=1.0)


@gluon.jit
def store_rows(
    out: gl.tensor,
    o: gl.tensor,
    sums: gl.tensor,
    batch: gl.tensor,
    head: gl.tensor,
    row: gl.tensor,
    tokens: gl.tensor,
    heads: gl.tensor,
) -> None:
    """Write o / sums, 64 rows from `row` on, into `out` (batch, tokens, heads, 128)."""
    y = regrouped(row_scaled(o, 1.0 / gl.sum(sums, 1)).to(out.dtype.element_ty), 4)
    LAYOUT: gl.constexpr = y.type.layout
    query = row + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    channel = gl.arange(0, HEAD, gl.SliceLayout(0, LAYOUT))
    begin = out + ((batch * tokens).to(gl.int64) * heads + head) * HEAD
    gl.store(begin + query[:, None] * (heads * HEAD) + channel[None, :], y, mask=(query < tokens)[:, None])


@gluon.jit
def multiply(
    GROUP: gl.constexpr,
    out: gl.tensor,
    numbers: gl.tuple,
    ring: gl.tuple,
    queries: gl.tuple,
    tokens: gl.tensor,
    heads: gl.tensor,
    tiles: gl.tensor,
    wide: gl.tensor,
    total: gl.tensor,
    blocks: gl.tensor,
    KEYS: gl.constexpr,
    SLOTS: gl.constexpr,
) -> None:
    """A warpgroup: its 64 queries of every tile, of every wide one where GROUP is the last."""
    k, v, full, empty = ring
    all_q, q_full, q_empty = queries
    q_scales, k_scales, exponents = numbers
    q = all_q.index(GROUP).reshape([ROWS, HEAD])
    n = 0
    odd = 0
    for tile in range(gl.program_id(0), total if GROUP < NARROW_GROUPS else wide, gl.num_programs(0)):
        batch, head, row = place(tile, tiles, wide, heads)
        last = (batch * heads + head) * blocks + blocks - 1
        exponent, k_scale = exponents + last, k_scales + last
        of_block = gl.load(exponent), gl.load(k_scale)
        q_scale = load_scales(q_scales + (batch * heads + head).to(gl.int64) * tokens, row + GROUP * ROWS, tokens, KEYS)
        mbarrier.wait(q_full.index(GROUP), odd)
        slot = n % SLOTS
        mbarrier.wait(full.index(slot), n // SLOTS & 1)
        s = scores(q, k.index(slot))
        mbarrier.arrive(empty.index(slot))
        n += 1
        s = masked(s, (blocks - 1) * KEYS, tokens)
        largest = gl.max(s, 1)
        o = gl.zeros([ROWS, HEAD], gl.float32, accumulator(HEAD, 32))
        if blocks > 1:
            slot = n % SLOTS
            s, largest, o, m, sums, of_block = step(
                q, k.index(slot), v.index(slot), full.index(slot), n // SLOTS & 1,
                s, largest, o, largest, largest, of_block, q_scale, exponent - 1, k_scale - 1, True,
            )  # fmt: skip
            mbarrier.arrive(empty.index(slot))
            n += 1
            for i in range(2, blocks):
                slot = n % SLOTS
                s, largest, o, m, sums, of_block = step(
                    q, k.index(slot), v.index(slot), full.index(slot), n // SLOTS & 1,
                    s, largest, o, m, sums, of_block, q_scale, exponent - i, k_scale - i, False,
                )  # fmt: skip
                mbarrier.arrive(empty.index(slot))
                n += 1
            p, o, sums = last_probabilities(s, largest, o, m, sums, of_block, q_scale, False)
        else:
            p, o, sums = last_probabilities(s, largest, o, largest, largest, of_block, q_scale, True)
        mbarrier.arrive(q_empty.index(GROUP))
        slot = n % SLOTS
        p8 = operand(p)
        mbarrier.wait(full.index(slot), n // SLOTS & 1)
        o = with_values(p8, v.index(slot), o, False)
        mbarrier.arrive(empty.index(slot))
        n += 1
        store_rows(out, o, sums, batch, head, row + GROUP * ROWS, tokens, heads)
        odd = odd ^ 1
    if GROUP >= NARROW_GROUPS:
        pass_by(full, empty, n, gl.where(gl.program_id(0) < total - wide, blocks + 1, 0), SLOTS)


# the kernel -----------------------------------------------------------------------------------------------------------


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr) -> gl.shared_memory_descriptor:
    """COUNT barriers, each completed by so many arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit(do_not_specialize=["tokens", "heads", "tiles", "wide", "total", "blocks"])
def attention_eight_bit_kernel(
    q_desc: gl.tensor,  # boxes of (1, 1, 64, 128) of (batch, heads, tokens, 128) in int8
    k_desc: gl.tensor,  # boxes of (1, 1, KEYS, 128)
    v_desc: gl.tensor,  # boxes of (128, KEYS) of the codes
    out: gl.tensor,  # (batch, tokens, heads, 128) contiguous
    q_scales: gl.tensor,  # (batch, heads, tokens) contiguous
    k_scales: gl.tensor,  # (batch * heads, blocks) contiguous
    exponents: gl.tensor,  # likewise
    tokens: gl.tensor,
    heads: gl.tensor,
    tiles: gl.tensor,
    wide: gl.tensor,
    total: gl.tensor,
    blocks: gl.tensor,
    KEYS: gl.constexpr,
    SLOTS: gl.constexpr,
) -> None:
    """Tiles of 192 queries, `tiles` a head; `blocks` of KEYS keys a head.

    The first `wide` of `total` tiles are that; behind them stand narrow ones, of 128 queries, one a program at most.
    """
    q = gl.allocate_shared_memory(q_desc.dtype, [GROUPS, 1, 1, ROWS, HEAD], q_desc.layout)
    k = gl.allocate_shared_memory(k_desc.dtype, [SLOTS, 1, 1, KEYS, HEAD], k_desc.layout)
    v = gl.allocate_shared_memory(v_desc.dtype, [SLOTS, HEAD, KEYS], v_desc.layout)
    ring = (k, v, barriers(SLOTS, 1), barriers(SLOTS, GROUPS))
    queries = (q, barriers(GROUPS, 1), barriers(GROUPS, 1))
    numbers = (q_scales, k_scales, exponents)
    # constants have to stand in the call itself: a variable makes them values
    gl.warp_specialize(
        [
            (multiply, (0, out, numbers, ring, queries, tokens, heads, tiles, wide, total, blocks, KEYS, SLOTS)),
            (multiply, (1, out, numbers, ring, queries, tokens, heads, tiles, wide, total, blocks, KEYS, SLOTS)),
            (multiply, (2, out, numbers, ring, queries, tokens, heads, tiles, wide, total, blocks, KEYS, SLOTS)),
            (load, (q_desc, k_desc, v_desc, ring, queries, heads, tiles, wide, total, blocks, KEYS, SLOTS)),
        ],
        [4, 4, 1],
        [GROUP_REGISTERS, GROUP_REGISTERS, LOADER_REGISTERS],
    )
