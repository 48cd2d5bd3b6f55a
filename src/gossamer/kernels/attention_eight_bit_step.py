"""What a warpgroup does with a block of keys: its share of `attention_eight_bit_kernel`, without rings and tiles.

    S = q8 k8^T                    int8, exact in int32
    P = 2^(r S + e + 8 - m)        r: scales of a query and of the block; m: the largest `r S + e` of a row so far,
                                   so P is at most 2^8
    y = (P v / 2^e) / sum(P / 2^e) P and v / 2^e in e4m3, float32 sums; e: one whole number for every block of keys

Whole numbers become float32 for nothing: the sums begin at the bits of BIAS = 1.5 * 2^23, where float32 counts in ones,
and what comes out, read as float32, is BIAS + S. |S| is at most 128 * 127^2 < 2^21.

`step` is the body of the inner loop: exponentials, P v, the next block's scores, one after the other. It is the other
warpgroups that have work for the tensor cores meanwhile: a third of them takes the registers that scores of two blocks
at once would. Nothing is in flight from one step to the next: the compiler would then wait after every single product.

Order of keys. A thread gets scores of columns 8 g + 2 t + {0, 1} (t: four lanes a row) and has to give P at columns
4 t + {0, 1, 2, 3} of every 16: `v8` is stored with its keys in that order (`attention_codes`), so nothing moves.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.runtime.jit import constexpr_function

HEAD = gl.constexpr(128)  # channels of a head
ROWS = gl.constexpr(64)  # queries of a warpgroup
P_SHIFT = gl.constexpr(8.0)
BIAS, BIAS_BITS = gl.constexpr(12582912.0), gl.constexpr(0x4B400000)


@constexpr_function
def accumulator(columns: int, depth: int) -> gl.NVMMADistributedLayout:
    """What a warpgroup's product of 64 rows leaves in its threads; `depth` is 32 bytes of operands."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, depth])


@gluon.jit
def regrouped(x: gl.tensor, GROUPS: gl.constexpr) -> gl.tensor:
    """Columns (GROUPS, 4 lanes, 2) of every 8 * GROUPS in the order (4 lanes, GROUPS, 2): a thread's side by side."""
    COLUMNS: gl.constexpr = x.shape[1]
    x = gl.permute(gl.reshape(x, [ROWS, COLUMNS // (8 * GROUPS), GROUPS, 4, 2]), [0, 1, 3, 2, 4])
    return gl.reshape(x, [ROWS, COLUMNS])


@gluon.jit
def row_scaled(x: gl.tensor, factor: gl.tensor) -> gl.tensor:
    """Every row of `x` by its factor."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    return x * gl.convert_layout(factor, LAYOUT, assert_trivial=True)[:, None]


# scores ---------------------------------------------------------------------------------------------------------------


@gluon.jit
def scores(q: gl.shared_memory_descriptor, k: gl.shared_memory_descriptor) -> gl.tensor:
    """BIAS + q k^T (64, keys) in float32; k (1, 1, keys, 128)."""
    KEYS: gl.constexpr = k.shape[2]
    bias = gl.full([ROWS, KEYS], BIAS_BITS, gl.int32, accumulator(KEYS, 32))
    started = warpgroup_mma(q, k.reshape([KEYS, HEAD]).permute([1, 0]), bias, is_async=True)
    return warpgroup_mma_wait(0, deps=[started]).to(gl.float32, bitcast=True)


@gluon.jit
def masked(s: gl.tensor, first: gl.tensor, tokens: gl.tensor) -> gl.tensor:
    """Scores (64, keys) of the keys from `first` on, minus infinity behind the last token."""
    key = first + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
    return gl.where((key < tokens)[None, :], s, float("-inf"))


# probabilities --------------------------------------------------------------------------------------------------------


@gluon.jit
def top(largest: gl.tensor, scale: gl.tensor, e: gl.tensor) -> gl.tensor:
    """`r S + e` (64,) of the largest scores."""
    return gl.fma(largest - BIAS, scale, e + gl.zeros_like(scale))


@gluon.jit
def logarithms(s: gl.tensor, m: gl.tensor, scale: gl.tensor, e: gl.tensor) -> gl.tensor:
    """log2 P (64, keys)."""
    rest = gl.fma(gl.zeros_like(scale) - BIAS, scale, e + P_SHIFT - m)
    return gl.fma(s, gl.broadcast(scale[:, None], s)[0], gl.broadcast(rest[:, None], s)[0])


@gluon.jit
def powers(logarithm: gl.tensor, e: gl.tensor) -> gl.tuple:
    """P (64, keys) in float32, and the sums of P / 2^e that a thread has, (64, 8)."""
    p = gl.exp2(logarithm)
    # rows are added up across lanes once a tile
    return p, gl.sum(gl.reshape(p, [ROWS, p.shape[1] // 8, 8]), 1) * gl.exp2(-e)


@gluon.jit
def operand(p: gl.tensor) -> gl.tensor:
    """P (64, keys) rounded to e4m3, as the left operand of a product."""
    LAYOUT: gl.constexpr = gl.DotOperandLayout(0, accumulator(HEAD, 32), 4)
    p = gl.convert_layout(regrouped(p, 2), LAYOUT, assert_trivial=True)
    # four at once: a conversion by pairs leaves the packing of bytes to many small instructions
    return gl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }""",
        "=r,f,f,f,f",
        [p],
        gl.float8e4nv,
        is_pure=True,
        pack=4,
    )


# blocks ---------------------------------------------------------------------------------------------------------------


@gluon.jit
def with_values(p8: gl.tensor, v: gl.shared_memory_descriptor, o: gl.tensor, FIRST: gl.constexpr) -> gl.tensor:
    """`o` (64, 128) and P v; P v alone where FIRST. v (128, keys)."""
    started = warpgroup_mma(p8, v.permute([1, 0]), o, use_acc=not FIRST, is_async=True)
    return warpgroup_mma_wait(0, deps=[started])


@gluon.jit
def step(
    q: gl.shared_memory_descriptor,
    k: gl.shared_memory_descriptor,
    v: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor,
    phase: gl.tensor,
    s: gl.tensor,
    largest: gl.tensor,
    o: gl.tensor,
    m: gl.tensor,
    sums: gl.tensor,
    numbers: gl.tuple,
    q_scale: gl.tensor,
    next_exponent: gl.tensor,
    next_scale: gl.tensor,
    FIRST: gl.constexpr,
) -> gl.tuple:
    """Exponentials and P v of a block of keys, and the scores of the next with their largest.

    `s` (64, keys), `largest` (64,) and `numbers`, its exponent and scale, are of this block, `v` too; `k` and the last
    two are of the next. Both are there when `full` has completed `phase`. `o` (64, 128), `m` (64,) and `sums` (64, 8)
    are of the blocks before; where FIRST there are none, and `m` and `sums` are not read. All six come back, for the
    next step.
    """
    e, k_scale = numbers
    scale = q_scale * k_scale
    before = m
    m = top(largest, scale, e) if FIRST else gl.maximum(m, top(largest, scale, e))
    shrunk = gl.exp2(before - m)
    p, more = powers(logarithms(s, m, scale, e), e)
    sums = more if FIRST else row_scaled(sums, shrunk) + more
    if not FIRST:
        o = row_scaled(o, shrunk)
    numbers = gl.load(next_exponent), gl.load(next_scale)
    p8 = operand(p)
    mbarrier.wait(full, phase)
    o = with_values(p8, v, o, FIRST)
    s = scores(q, k)
    largest = gl.max(s, 1)
    return s, largest, o, m, sums, numbers


@gluon.jit
def last_probabilities(
    s: gl.tensor,
    largest: gl.tensor,
    o: gl.tensor,
    m: gl.tensor,
    sums: gl.tensor,
    numbers: gl.tuple,
    q_scale: gl.tensor,
    FIRST: gl.constexpr,
) -> gl.tuple:
    """P (64, keys) of the last block in float32, with `o` and `sums` ready for it; arguments as those of `step`."""
    e, k_scale = numbers
    scale = q_scale * k_scale
    before = m
    m = top(largest, scale, e) if FIRST else gl.maximum(m, top(largest, scale, e))
    p, more = powers(logarithms(s, m, scale, e), e)
    if not FIRST:
        shrunk = gl.exp2(before - m)
        more = row_scaled(sums, shrunk) + more
        o = row_scaled(o, shrunk)
    return p, o, more
