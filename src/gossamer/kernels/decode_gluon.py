"""The decode kernel with layouts of its own: no weight moves from one thread to another.

The same as `decode_kernel.decode_kernel`, for chips from Ampere on and up to 64 ranks. There Triton chooses a layout
for each load, and between loads, tensor cores and stores values change threads through shared memory: 12 to 26 barriers
a tile, and loads that touch as many cache lines as a warp has lanes.

Here the order of columns inside a tile is chosen instead. A product does not care in which order `down` has its
columns, as long as the stored tile has them in the same order. So a thread decodes RUN neighbouring columns, whose
codes it reads as whole words and whose results it writes side by side, and these become the elements that tensor cores
expect in that thread: 8 rows are spread over the lanes, four lanes share a row, and a thread has pairs of columns.
`matrix_order` states which column stands where.

What binds it with terms is the load-store unit: a load or store takes as long as it touches rows, and each has eight.
So both factors wait in shared memory, `down` for the whole program and `up` for _UP_ROWS rows, and a thread has as many
columns of a row as its registers allow. A Hopper warpgroup reads both factors there itself, once for 64 rows. Or the
product is turned: that of the transposed factors leaves four rows in the lanes, and `down` stays in registers.

Only the layout of the weights is stated; those of all loads follow from it backwards (Gluon's automatic layouts).

fp8 has three fraction bits. Towards it stored weights are float16 in units of their row, so that two share an
instruction: half of the instructions, and a decoded weight is at most 2^-9 of itself further from its exact value than
half a step of fp8 (where a minimum is added, 2^-9 of the larger summand). Low-rank terms are summed in float16 too, on
top of the weight: `up` in units of its row, times the rank's scale and the power of two that `down` is divided by.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from gossamer.kernels.decode_gluon_layouts import (
    TURNED,
    bit_places,
    bit_shape,
    line_layout,
    matrix_order,
    product_layout,
    shared_layout,
    ups_layout,
    weights_layout,
)
from gossamer.kernels.decode_kernel import band_place, base_tile, in_halves, rounded
from gossamer.kernels.decode_tiles import row_starts, steps, tile_rows, whole

# rows of `up` that are in shared memory at a time: two barriers in so many rows
_UP_ROWS = gl.constexpr(128)


@gluon.jit
def _reordered(tile: gl.tensor, ORDER: gl.constexpr, BACK: gl.constexpr) -> gl.tensor:
    """The columns of `tile` in another order of bits."""
    SHAPE: gl.constexpr = bit_shape(tile.shape[0], tile.shape[1])
    PLACES: gl.constexpr = bit_places(ORDER, BACK)
    return gl.reshape(gl.permute(gl.reshape(tile, SHAPE.value), PLACES.value), tile.shape)


@gluon.jit
def _finite_halves(value: gl.tensor) -> gl.tensor:
    """Float32 to the nearest float16 that is finite; NaN stays NaN."""
    return gl.inline_asm_elementwise(
        "cvt.rn.satfinite.f16x2.f32 $0, $2, $1;", "=r,r,r", [value], dtype=gl.float16, is_pure=True, pack=2
    )


@gluon.jit
def _up(
    up: gl.tensor,
    units: gl.tensor,
    factors: gl.tensor,
    begin: gl.tensor,
    rows: gl.tensor,
    ROWS: gl.constexpr,
    RANKS: gl.constexpr,
) -> gl.tensor:
    """(ROWS, RANKS) of `up`; with `factors` (RANKS,) float16, times these, in `units` of the rows.

    What has no place in float16 then is 146 times as large as any weight of its row, and others cancel it: of such
    a sum no rounding of factors leaves anything.
    """
    LAYOUT: gl.constexpr = ups_layout(RANKS, gl.num_warps())
    pointer = row_starts(up, begin, rows, RANKS, ROWS)[:, None] + steps(RANKS)[None, :]
    value = gl.load(gl.set_auto_layout(pointer, LAYOUT))
    if factors is None:
        return value
    else:
        unit = gl.load(units + begin + tile_rows(begin, rows, ROWS))
        return _finite_halves(value.to(gl.float32) * factors[None, :] * (1.0 / unit)[:, None])


@gluon.jit
def _keep_ups(
    kept: gl.shared_memory_descriptor,
    up: gl.tensor,
    units: gl.tensor,
    factors: gl.tensor,
    begin: gl.tensor,
    rows: gl.tensor,
    tile: gl.tensor,
    WARPGROUP: gl.constexpr,
) -> None:
    """Before the first of some tiles, put the rows of `up` for all of them into shared memory."""
    if tile == 0:
        if not WARPGROUP:
            gl.thread_barrier()  # here and below, or every tile would have them
        kept.store(_up(up, units, factors, begin, rows, kept.shape[0], kept.shape[1]))
        if WARPGROUP:
            fence_async_shared()
        gl.thread_barrier()


@gluon.jit
def _down(
    down: gl.tensor,
    rank_scale: gl.tensor,
    rank_power: gl.tensor,
    start: gl.tensor,
    first: gl.tensor,
    width: gl.tensor,
    COLS: gl.constexpr,
    RANKS: gl.constexpr,
    EVEN: gl.constexpr,
    HALVES: gl.constexpr,
) -> gl.tensor:
    """(RANKS, COLS) from rank `start` on: `down / rank_power` in float16, or `rank_scale * down` in its own type."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [gl.num_warps(), 1], [1, 0])
    index, again, col = start + steps(RANKS), start + steps(RANKS), first + steps(COLS)
    pointer = gl.set_auto_layout(down + index[:, None] * width + col[None, :], LAYOUT)
    factor = gl.load(pointer, mask=whole(first + steps(COLS), width, EVEN)[None, :], other=0.0)
    if HALVES:
        return (factor.to(gl.float32) * (1.0 / gl.load(rank_power + again))[:, None]).to(gl.float16)
    else:
        return (factor.to(gl.float32) * gl.load(rank_scale + again)[:, None]).to(factor.dtype)


@gluon.jit
def _rank_factors(rank_scale: gl.tensor, rank_power: gl.tensor, start: gl.tensor, RANKS: gl.constexpr) -> gl.tensor:
    """What `up` is multiplied by (RANKS,) where it meets `down / rank_power`."""
    LAYOUT: gl.constexpr = gl.SliceLayout(0, ups_layout(RANKS, gl.num_warps()))
    rank, again = start + steps(RANKS), start + steps(RANKS)
    return gl.set_auto_layout(gl.load(rank_scale + rank) * gl.load(rank_power + again), LAYOUT)


@gluon.jit
def _keep_down(kept: gl.shared_memory_descriptor, down: gl.tensor, ORDER: gl.constexpr) -> None:
    """Into shared memory, columns in the order of tensor cores."""
    kept.store(gl.convert_layout(_reordered(down, ORDER, False), down.type.layout))


@gluon.jit
def _turned(tile: gl.tensor, DOWN: gl.constexpr) -> gl.tensor:
    """The transpose of `tile` where the product is turned."""
    return gl.permute(tile, (1, 0)) if DOWN == TURNED else tile


@gluon.jit
def _kept_down(
    right: gl.shared_memory_descriptor, WEIGHTS: gl.constexpr, DOWN: gl.constexpr, WARPGROUP: gl.constexpr
) -> gl.base_value:
    """`down` in registers for the whole program where the product is turned, else in shared memory."""
    if not WARPGROUP:
        gl.thread_barrier()  # or the first read of every tile would have it; warpgroups are faster with that
    if DOWN == TURNED:
        MMA: gl.constexpr = product_layout(WEIGHTS, DOWN, False)
        return right.permute((1, 0)).load(gl.DotOperandLayout(0, MMA, 2))
    else:
        return right


@gluon.jit
def _product(
    left: gl.shared_memory_descriptor,
    right: gl.base_value,
    tile: gl.tensor,
    ORDER: gl.constexpr,
    WEIGHTS: gl.constexpr,
    DOWN: gl.constexpr,
    WARPGROUP: gl.constexpr,
) -> gl.tensor:
    """left (ROWS, RANKS) @ right (RANKS, COLS), and `tile` if it is one, in the columns' stored order.

    Summed in the tile's type, else in float32.
    """
    MMA: gl.constexpr = product_layout(WEIGHTS, DOWN, WARPGROUP)
    if tile is None:
        ROWS: gl.constexpr = left.shape[0]
        COLS: gl.constexpr = right.shape[1]
        added = gl.zeros([ROWS, COLS], gl.float32, MMA)
    else:
        added = gl.convert_layout(_turned(_reordered(tile, ORDER, False), DOWN), MMA)
    if WARPGROUP:
        added = warpgroup_mma(left, right, added, use_acc=tile is not None)
    elif DOWN == TURNED:
        added = mma_v2(right, left.permute((1, 0)).load(gl.DotOperandLayout(1, MMA, 2)), added)
    else:
        added = mma_v2(left.load(gl.DotOperandLayout(0, MMA, 2)), right.load(gl.DotOperandLayout(1, MMA, 2)), added)
    return gl.convert_layout(_reordered(_turned(added, DOWN), ORDER, True), WEIGHTS)


@gluon.jit
def _fetch(
    codes: gl.tensor,
    begin: gl.tensor,
    rows: gl.tensor,
    first: gl.tensor,
    row_bytes: gl.tensor,
    ROWS: gl.constexpr,
    COLS: gl.constexpr,
    SPAN: gl.constexpr,
) -> None:
    """Ask L2 for the SPAN bytes of codes of each row of a tile; nobody waits for them."""
    LINES: gl.constexpr = line_layout(SPAN, gl.num_warps())
    start = codes.to(gl.pointer_type(gl.uint8)) + (first // COLS).to(gl.int64) * SPAN
    byte = gl.minimum(steps(LINES[0]) * 32, SPAN - 1)
    line = gl.set_auto_layout(row_starts(start, begin, rows, row_bytes, ROWS)[:, None] + byte[None, :], LINES[1])
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [line], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _lane_levels(levels: gl.tensor, DOWN: gl.constexpr) -> gl.tensor:
    """The table of `look_up`: lane n has entry n % 16."""
    gl.static_assert(DOWN != TURNED, "lanes lie in another order where the product is turned")
    ACROSS: gl.constexpr = 32 // DOWN
    beneath, beside = steps(DOWN)[None, :, None, None, None], steps(ACROSS)[None, None, None, :, None]
    return gl.load(levels + (beneath * ACROSS + beside & 15))


@gluon.jit(do_not_specialize_on_alignment=["band_rows", "tiles_each"])
def gluon_decode_kernel(
    out: gl.tensor,
    row_scale: gl.tensor,
    codes: gl.tensor,
    scale: gl.tensor,
    nested_scale: gl.tensor,
    nested_offset: gl.tensor,
    levels: gl.tensor,
    nested_levels: gl.tensor,
    up: gl.tensor,
    down: gl.tensor,
    rank_scale: gl.tensor,
    rank_power: gl.tensor,
    rows: gl.tensor,
    width: gl.tensor,
    stored_width: gl.tensor,
    row_bytes: gl.tensor,
    rank: gl.tensor,
    band_rows: gl.tensor,
    out_stride: gl.tensor,
    tiles_each: gl.tensor,
    FAMILY: gl.constexpr,
    FORMAT: gl.constexpr,
    BYTES: gl.constexpr,
    OUTPUT: gl.constexpr,
    RANKS: gl.constexpr,
    LATER_RANKS: gl.constexpr,
    ROWS: gl.constexpr,
    COLS: gl.constexpr,
    EVEN: gl.constexpr,
    RUN: gl.constexpr,
    KEPT: gl.constexpr,
    DOWN: gl.constexpr,
    SPAN: gl.constexpr,
    WARPGROUP: gl.constexpr,
) -> None:
    """Write `tiles_each` tiles of W_eff, each below the last, into `out` (rows, width) as float, fp8 or int8."""
    WARPS: gl.constexpr = gl.num_warps()
    gl.static_assert((levels is None) | (KEPT % (RUN * 32 // DOWN) == 0), "lanes with levels lie side by side")
    WEIGHTS: gl.constexpr = weights_layout(ROWS, COLS, RUN, KEPT, DOWN, WARPS)
    SHORT: gl.constexpr = in_halves(OUTPUT, FAMILY)
    first = gl.program_id(0) * COLS
    band, begin, stop = band_place(gl.program_id(1), rows, band_rows, tiles_each * ROWS)
    # with terms a thread selects the levels of four-bit codes itself
    SELECTS: gl.constexpr = SHORT and FAMILY == "four_bit" and up is not None
    table = None if levels is None or SELECTS else _lane_levels(levels, DOWN)
    if up is not None:
        gl.static_assert((DOWN == 8) | (DOWN == TURNED), "as many rows in the lanes of a warp as tensor cores have")
        gl.static_assert(not LATER_RANKS, "all ranks at once")
        ORDER: gl.constexpr = matrix_order(ROWS, COLS, RUN, KEPT, DOWN, WARPS)
        TILES: gl.constexpr = _UP_ROWS // ROWS
        UPS: gl.constexpr = shared_layout(RANKS, WARPGROUP)
        HALVES: gl.constexpr = SHORT and not WARPGROUP  # to bring many ranks to units takes longer than their sums
        FACTOR: gl.constexpr = gl.float16 if HALVES else up.dtype.element_ty
        ups = gl.allocate_shared_memory(FACTOR, [TILES, ROWS, RANKS], UPS)
        rows_of_ups = ups._reinterpret(FACTOR, [_UP_ROWS, RANKS], UPS)
        factors = _rank_factors(rank_scale, rank_power, band * rank, RANKS) if HALVES else None
        right = gl.allocate_shared_memory(FACTOR, [RANKS, COLS], shared_layout(COLS, WARPGROUP))
        own = _down(down, rank_scale, rank_power, band * rank, first, width, COLS, RANKS, EVEN, HALVES)
        _keep_down(right, own, ORDER)
        kept_down = _kept_down(right, WEIGHTS, DOWN, WARPGROUP)
    for index in range(tiles_each):
        top = begin + index * ROWS
        if SPAN:
            _fetch(codes, gl.minimum(top + ROWS, stop - 1), stop, first, row_bytes, ROWS, COLS, SPAN)
        if up is not None:
            _keep_ups(rows_of_ups, up, row_scale, factors, top, stop, index % TILES, WARPGROUP)
        if OUTPUT != "float":
            unit = gl.load(row_scale + top + tile_rows(top, stop, ROWS))
        tile = base_tile(
            codes, scale, nested_scale, nested_offset, table, nested_levels, row_scale if SHORT else None,
            top, stop, first, stored_width, row_bytes, FAMILY, FORMAT, BYTES, ROWS, COLS, EVEN, RUN,
        )  # fmt: skip
        tile = gl.set_auto_layout(tile, WEIGHTS)
        if up is not None:
            begun = None if SHORT and WARPGROUP else tile
            added = _product(ups.index(index % TILES), kept_down, begun, ORDER, WEIGHTS, DOWN, WARPGROUP)
            tile = gl.fma(added, (1.0 / unit)[:, None], tile.to(gl.float32)) if begun is None else added
        if OUTPUT != "float" and not SHORT:
            tile *= gl.div_rn(1.0, unit)[:, None]
        value = rounded(tile, out.dtype.element_ty, OUTPUT)
        pointer = row_starts(out, top, stop, out_stride, ROWS)[:, None] + (first + steps(COLS))[None, :]
        mask = (top + steps(ROWS) < stop)[:, None] & whole(first + steps(COLS), width, EVEN)[None, :]
        gl.store(gl.set_auto_layout(pointer, WEIGHTS), value, mask=mask)
