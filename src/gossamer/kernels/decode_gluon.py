"""The decode kernel with layouts of its own: no value moves from one thread to another, and no barrier is in the loop.

The same as `decode_kernel.decode_kernel`, for chips from Ampere on. There Triton chooses a layout for each load, and
between loads, tensor cores and stores values change threads through shared memory: 12 to 26 barriers a tile, and loads
that touch as many cache lines as a warp has lanes.

Here the order of columns and ranks inside a tile is chosen instead. A product does not care in which order `down` has
its columns, as long as the stored tile has them in the same order. So a thread decodes RUN neighbouring columns, whose
codes it reads as whole words and whose results it writes side by side, and these become the elements that `mma.sync`
expects in that thread: 8 rows are spread over the lanes, four lanes share a row, and a thread has pairs of columns.
`_matrix_order` states which column stands where. Ranks are ordered in the same way, so that `up` is read in long words.

DOWN 4 turns this round: the product is that of the transposed factors, so that eight lanes share a row and a load
touches four rows only, half the cache lines. `down` then takes twice the registers.

Only the layout of the weights is stated; those of all loads follow from it backwards (Gluon's automatic layouts).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.runtime.jit import constexpr_function

from gossamer.kernels.decode_kernel import band_place, base_tile, rounded
from gossamer.kernels.decode_tiles import row_starts, steps, tile_rows, whole


@constexpr_function
def _bits(size: int) -> int:
    return size.bit_length() - 1


@constexpr_function
def _weights(rows: int, cols: int, run: int, kept: int, down: int, warps: int) -> gl.DistributedLinearLayout:
    """A tile in stored order: a thread has RUN neighbours, and those that are a bit of KEPT apart from them.

    Lanes have the columns between, and `down` of them rows of their own; warps come last.
    """
    low, bits = _bits(run), _bits(cols)
    own = [bit for bit in range(low, bits) if kept >> bit & 1]
    others = [bit for bit in range(low, bits) if bit not in own]
    across = _bits(32 // down)
    lanes, left = others[:across], others[across:]
    # warps share the columns that are left, then rows
    sharing, spare = left[: _bits(warps)], left[_bits(warps) :]
    # four lanes down have pairs of rows, as tensor cores have them the other way round
    pair = int(down == 4)
    deep = range(_bits(down) + pair, _bits(down) + pair + _bits(warps) - len(sharing))
    columns = [[0, 1 << bit] for bit in sorted([*range(low), *own, *spare])]
    above = [[1 << bit, 0] for bit in [*range(pair), *range(deep.stop, _bits(rows))]]
    below = [[1 << bit, 0] for bit in range(pair, _bits(down) + pair)]
    beside = [[0, 1 << bit] for bit in lanes]
    return gl.DistributedLinearLayout(
        columns + above,
        below + beside if pair else beside + below,
        [[0, 1 << bit] for bit in sharing] + [[1 << bit, 0] for bit in deep],
        [],
        [rows, cols],
    )


@constexpr_function
def _matrix_order(cols: int, run: int, kept: int, down: int, warps: int) -> tuple[int, ...]:
    """The bits of a column in the order of tensor cores, lowest first: pairs, lanes, warps, the rest of a thread."""
    layout = _weights(16, cols, run, kept, down, warps)
    lanes = [_bits(basis[1]) for basis in layout.lane_bases if basis[1]]
    warp = [_bits(basis[1]) for basis in layout.warp_bases]
    registers = [_bits(basis[1]) for basis in layout.reg_bases if basis[1]]
    if down == 4:
        return (*lanes, registers[0], *warp, *registers[1:])
    return (registers[0], *lanes, *warp, *registers[1:])


@constexpr_function
def _rank_order(ranks: int) -> tuple[int, ...]:
    """The same for ranks: neighbouring ones are a thread's, and four lanes share them."""
    high = _bits(ranks)
    return (0, 1, 2, 3) if ranks == 16 else (0, high - 2, high - 1, *range(1, high - 2))


@constexpr_function
def _ups(rows: int, ranks: int, warps: int) -> gl.DistributedLinearLayout:
    """`up` in stored order, the same in all warps."""
    order = _rank_order(ranks)
    registers = [[0, 1 << bit] for bit in sorted((order[0], *order[3:]))]
    registers += [[1 << bit, 0] for bit in range(3, _bits(rows))]
    lanes = [[0, 1 << order[1]], [0, 1 << order[2]], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0]] * _bits(warps), [], [rows, ranks])


@constexpr_function
def _bit_shape(size: int, other: int, last: bool) -> list[int]:
    """`size` as a dimension a bit, highest first, beside a dimension that stays."""
    bits = [2] * _bits(size)
    return [other, *bits] if last else [*bits, other]


@constexpr_function
def _bit_places(order: tuple[int, ...], last: bool, back: bool) -> list[int]:
    """The permutation of such dimensions that puts bit order[i] on place i, or back."""
    count = len(order)
    source = [count - 1 - order[count - 1 - place] for place in range(count)]
    if back:
        source = [source.index(place) for place in range(count)]
    return [0, *(place + 1 for place in source)] if last else [*source, count]


@gluon.jit
def _reordered(tile: gl.tensor, ORDER: gl.constexpr, BACK: gl.constexpr) -> gl.tensor:
    """The columns of `tile` in another order of bits."""
    SHAPE: gl.constexpr = _bit_shape(tile.shape[1], tile.shape[0], True)
    PLACES: gl.constexpr = _bit_places(ORDER, True, BACK)
    return gl.reshape(gl.permute(gl.reshape(tile, SHAPE.value), PLACES.value), tile.shape)


@gluon.jit
def _rows_reordered(tile: gl.tensor, ORDER: gl.constexpr) -> gl.tensor:
    """The rows of `tile` in another order of bits."""
    SHAPE: gl.constexpr = _bit_shape(tile.shape[0], tile.shape[1], False)
    PLACES: gl.constexpr = _bit_places(ORDER, False, False)
    return gl.reshape(gl.permute(gl.reshape(tile, SHAPE.value), PLACES.value), tile.shape)


@gluon.jit
def _operand(factor: gl.tensor, SIDE: gl.constexpr, MMA: gl.constexpr, TURNED: gl.constexpr) -> gl.tensor:
    """The left (0) or right (1) factor in the layout of tensor cores."""
    if TURNED:
        return gl.convert_layout(gl.permute(factor, (1, 0)), gl.DotOperandLayout(1 - SIDE, MMA, 2))
    else:
        return gl.convert_layout(factor, gl.DotOperandLayout(SIDE, MMA, 2))


@gluon.jit
def _left(
    up: gl.tensor,
    begin: gl.tensor,
    rows: gl.tensor,
    start: gl.tensor,
    rank: gl.tensor,
    ROWS: gl.constexpr,
    RANKS: gl.constexpr,
    MMA: gl.constexpr,
    TURNED: gl.constexpr,
) -> gl.tensor:
    """RANKS ranks of `up` from `start` on, for tensor cores."""
    LAYOUT: gl.constexpr = _ups(ROWS, RANKS, gl.num_warps())
    pointer = row_starts(up, begin, rows, rank, ROWS)[:, None] + (start + steps(RANKS))[None, :]
    value = gl.load(gl.set_auto_layout(pointer, LAYOUT))
    return _operand(_reordered(value, _rank_order(RANKS), False), 0, MMA, TURNED)


@gluon.jit
def _right(
    down: gl.tensor,
    rank_scale: gl.tensor,
    start: gl.tensor,
    first: gl.tensor,
    width: gl.tensor,
    COLS: gl.constexpr,
    RANKS: gl.constexpr,
    ORDER: gl.constexpr,
    MMA: gl.constexpr,
    TURNED: gl.constexpr,
    EVEN: gl.constexpr,
) -> gl.tensor:
    """RANKS ranks of `rank_scale * down` from `start` on, those of all bands one after the other, for tensor cores.

    They pass through shared memory.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [gl.num_warps(), 1], [1, 0])
    index, again, col = start + steps(RANKS), start + steps(RANKS), first + steps(COLS)
    pointer = gl.set_auto_layout(down + index[:, None] * width + col[None, :], LAYOUT)
    factor = gl.load(pointer, mask=whole(first + steps(COLS), width, EVEN)[None, :], other=0.0)
    scaled = (factor.to(gl.float32) * gl.load(rank_scale + again)[:, None]).to(factor.dtype)
    scaled = _rows_reordered(_reordered(scaled, ORDER, False), _rank_order(RANKS))
    return _operand(scaled, 1, MMA, TURNED)


@gluon.jit
def _product(left: gl.tensor, right: gl.tensor, tile: gl.tensor, TURNED: gl.constexpr) -> gl.tensor:
    """`tile` and left @ right; the transpose of it from transposed operands when TURNED."""
    if TURNED:
        return mma_v2(right, left, tile)
    else:
        return mma_v2(left, right, tile)


@gluon.jit
def _turned(tile: gl.tensor, TURNED: gl.constexpr) -> gl.tensor:
    """`tile`, or its transpose."""
    return gl.permute(tile, (1, 0)) if TURNED else tile


@gluon.jit
def _lane_levels(levels: gl.tensor, DOWN: gl.constexpr) -> gl.tensor:
    """The table of `look_up`: lane n has entry n % 16."""
    ACROSS: gl.constexpr = 32 // DOWN
    across = steps(ACROSS)[None, None, None, :, None]
    if DOWN == 4:
        lane = (steps(8) >> 1)[None, :, None, None, None] + across * 4
    else:
        lane = steps(DOWN)[None, :, None, None, None] * ACROSS + across
    return gl.load(levels + (lane & 15))


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
) -> None:
    """Write `tiles_each` tiles of W_eff, each below the last, into `out` (rows, width) as float, fp8 or int8."""
    WARPS: gl.constexpr = gl.num_warps()
    gl.static_assert((levels is None) | (KEPT % (RUN * 32 // DOWN) == 0), "lanes with levels lie side by side")
    WEIGHTS: gl.constexpr = _weights(ROWS, COLS, RUN, KEPT, DOWN, WARPS)
    first = gl.program_id(0) * COLS
    band, begin, stop = band_place(gl.program_id(1), rows, band_rows, tiles_each * ROWS)
    table = levels if levels is None else _lane_levels(levels, DOWN)
    if up is not None:
        TURNED: gl.constexpr = DOWN == 4
        MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1] if TURNED else [1, WARPS], [16, 8])
        ORDER: gl.constexpr = _matrix_order(COLS, RUN, KEPT, DOWN, WARPS)
        right = _right(down, rank_scale, band * rank, first, width, COLS, RANKS, ORDER, MMA, TURNED, EVEN)
    for index in range(tiles_each):
        top = begin + index * ROWS
        if up is not None:
            left = _left(up, top, stop, 0, rank, ROWS, RANKS, MMA, TURNED)
        if OUTPUT != "float":
            unit = gl.load(row_scale + top + tile_rows(top, stop, ROWS))
        tile = base_tile(
            codes, scale, nested_scale, nested_offset, table, nested_levels,
            top, stop, first, stored_width, row_bytes, FAMILY, FORMAT, BYTES, ROWS, COLS, EVEN, RUN,
        )  # fmt: skip
        tile = gl.set_auto_layout(tile, WEIGHTS)
        if up is not None:
            tile = gl.convert_layout(_turned(_reordered(tile, ORDER, False), TURNED), MMA)
            tile = _product(left, right, tile, TURNED)
            if LATER_RANKS:
                for start in range(RANKS, rank, RANKS):
                    more = _left(up, top, stop, start, rank, ROWS, RANKS, MMA, TURNED)
                    begun = band * rank + start
                    later = _right(down, rank_scale, begun, first, width, COLS, RANKS, ORDER, MMA, TURNED, EVEN)
                    tile = _product(more, later, tile, TURNED)
            tile = gl.convert_layout(_reordered(_turned(tile, TURNED), ORDER, True), WEIGHTS)
        if OUTPUT != "float":
            tile *= gl.div_rn(1.0, unit)[:, None]
        value = rounded(tile, out.dtype.element_ty, OUTPUT)
        pointer = row_starts(out, top, stop, out_stride, ROWS)[:, None] + (first + steps(COLS))[None, :]
        mask = (top + steps(ROWS) < stop)[:, None] & whole(first + steps(COLS), width, EVEN)[None, :]
        gl.store(gl.set_auto_layout(pointer, WEIGHTS), value, mask=mask)
