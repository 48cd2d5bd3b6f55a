"""Which thread has what in `decode_gluon`: tiles of weights, low-rank factors, what tensor cores expect and leave.

All of these are numbers that are known when a kernel is compiled; they make no code.
"""

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

from gossamer.kernels import decode_geometry

TURNED = gl.constexpr(decode_geometry.TURNED)


@constexpr_function
def _bits(size: int) -> int:
    return size.bit_length() - 1


@constexpr_function
def weights_layout(rows: int, cols: int, run: int, kept: int, down: int, warps: int) -> gl.DistributedLinearLayout:
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
    # tensor cores have two rows a thread: eight apart, or neighbours where the product is turned
    pair = int(down == TURNED)
    below = _bits(down) + (down >= TURNED)
    deep = range(below, below + _bits(warps) - len(sharing))
    columns = [[0, 1 << bit] for bit in sorted([*range(low), *own, *spare])]
    beside = [[0, 1 << bit] for bit in lanes]
    beneath = [[1 << bit, 0] for bit in range(pair, pair + _bits(down))]
    taken = [*range(pair, pair + _bits(down)), *deep]
    abreast, stacked = [[0, 1 << bit] for bit in sharing], [[1 << bit, 0] for bit in deep]
    return gl.DistributedLinearLayout(
        columns + [[1 << bit, 0] for bit in range(_bits(rows)) if bit not in taken],
        beneath + beside if pair else beside + beneath,
        stacked + abreast if pair else abreast + stacked,
        [],
        [rows, cols],
    )


@constexpr_function
def matrix_order(rows: int, cols: int, run: int, kept: int, down: int, warps: int) -> tuple[int, ...]:
    """The bits of a column in the order of tensor cores, lowest first: pairs, lanes, warps, the rest of a thread."""
    layout = weights_layout(rows, cols, run, kept, down, warps)
    lanes = [_bits(basis[1]) for basis in layout.lane_bases if basis[1]]
    warp = [_bits(basis[1]) for basis in layout.warp_bases if basis[1]]
    registers = [_bits(basis[1]) for basis in layout.reg_bases if basis[1]]
    if down == TURNED:
        return (*lanes, registers[0], *warp, *registers[1:])
    return (registers[0], *lanes, *warp, *registers[1:])


@constexpr_function
def bit_places(order: tuple[int, ...], back: bool) -> list[int]:
    """The permutation of (rows, a bit of the column each, highest first) that puts bit order[i] on place i, or back."""
    count = len(order)
    source = [count - 1 - order[count - 1 - place] for place in range(count)]
    if back:
        source = [source.index(place) for place in range(count)]
    return [0, *(place + 1 for place in source)]


@constexpr_function
def bit_shape(rows: int, cols: int) -> list[int]:
    """A tile with a dimension for each bit of its columns, highest first."""
    return [rows, *[2] * _bits(cols)]


@constexpr_function
def product_layout(weights: gl.DistributedLinearLayout, down: int, warpgroup: bool) -> gl.NVMMADistributedLayout:
    """What a product leaves in which thread; warps lie as they do in `weights`."""
    stacked = 1 << sum(1 for basis in weights.warp_bases if basis[0])
    abreast = 1 << sum(1 for basis in weights.warp_bases if basis[1])
    if warpgroup:
        return gl.NVMMADistributedLayout([3, 0], [stacked, 1], [16, weights.shape[1], 16])
    return gl.NVMMADistributedLayout([2, 0], [abreast, stacked] if down == TURNED else [stacked, abreast], [16, 8])


@constexpr_function
def shared_layout(inner: int, warpgroup: bool) -> gl.SwizzledSharedLayout | gl.NVMMASharedLayout:
    """Rows of `inner` 16-bit numbers in shared memory, such that eight rows have no bank in common."""
    if warpgroup:
        return gl.NVMMASharedLayout(min(128, 2 * inner), 16, 2)
    together = max(1, 64 // inner)  # rows that fill all banks
    return gl.SwizzledSharedLayout(8, together, 8 // together, [1, 0])


@constexpr_function
def ups_layout(ranks: int, warps: int) -> gl.BlockedLayout:
    """Rows of `up` in long words."""
    return gl.BlockedLayout([1, 8], [256 // ranks, ranks // 8], [warps, 1], [1, 0])


@constexpr_function
def line_layout(span: int, warps: int) -> tuple[int, gl.BlockedLayout]:
    """How many lines of 32 bytes `span` bytes fill, as a power of two, and a layout of such lines of all rows."""
    count = 1 << (-(-span // 32) - 1).bit_length()
    return count, gl.BlockedLayout([1, 1], [max(1, 32 // count), min(32, count)], [warps, 1], [1, 0])
