"""Decoding a packed weight, low-rank terms included, into a buffer that a library product reads: the Triton backend.

`decode_reference` is the same in torch. Import this module only where Triton is there and was chosen.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton

from gossamer.errors import InvalidOptionError, UnsupportedShapeError
from gossamer.formats import Packed
from gossamer.kernels.bound_launch import BoundLaunch
from gossamer.kernels.decode_geometry import (
    ROW_SCALE,
    ROW_SCALE_WITH_TERMS,
    STORED_ONLY,
    WITH_TERMS,
    Geometry,
    chosen_geometry,
)
from gossamer.kernels.decode_kernel import decode_kernel, row_scale_kernel
from gossamer.kernels.decode_reference import FLOAT_TYPES, LARGEST_CODE
from gossamer.kernels.decode_support import READABLE, has_fp8, require_decodable, stored_parts
from gossamer.kernels.low_rank import StackedTerms, rank_step

# Gluon before Triton 3.6, such as the one that comes with torch 2.9, lacks the products of Ampere
HAS_GLUON = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)
if HAS_GLUON:
    from gossamer.kernels.decode_gluon import gluon_decode_kernel

BF16_CAPABILITY = (8, 0)
HOPPER = (9, 0)
OUTPUTS = {torch.float8_e4m3fn: "fp8", torch.int8: "int8"}


class _Layout(NamedTuple):
    """What the static choices of a call depend on; `factors` is the type of the low-rank factors, `bands` theirs."""

    storage: str
    shape: tuple[int, int]
    width: int
    device: torch.device
    factors: torch.dtype | None = None
    rank: int = 0
    bands: int = 1

    @property
    def band_rows(self) -> int:
        """Rows that share the ranks of `down`."""
        return self.shape[0] // self.bands


def decode(
    packed: Packed,
    out: torch.Tensor,
    terms: StackedTerms | None = None,
    row_scale: torch.Tensor | None = None,
) -> None:
    """Write W_eff into `out` (rows, width): fp32, fp16 or bf16, or fp8 or int8 in units of `row_scale` (rows,).

    `out` may be a slice of rows of a larger buffer; where it is wider than the packed weight, the base has zeros there.
    `row_scale` is read, not written: `measure_row_scale` fills it, once for as long as weight and terms stay the same.
    A larger scale, such as a sum of bounds, is as good for fp8, whose step follows the value; codes beyond saturate. On
    the way to fp8 stored weights are rounded to eleven bits: a code may be the second nearest where two are as near.
    """
    bound_decode(packed, out, terms, row_scale)()


def bound_decode(
    packed: Packed,
    out: torch.Tensor,
    terms: StackedTerms | None = None,
    row_scale: torch.Tensor | None = None,
) -> BoundLaunch:
    """`decode` made ready, to be run as often as its tensors change their contents."""
    return bound_decode_by(_geometry(packed, out, terms), packed, out, terms, row_scale)


def decode_by(
    geometry: Geometry,
    packed: Packed,
    out: torch.Tensor,
    terms: StackedTerms | None = None,
    row_scale: torch.Tensor | None = None,
    tiles_each: int | None = None,
) -> None:
    """`decode` with a geometry, and a number of tiles a program, of one's own."""
    bound_decode_by(geometry, packed, out, terms, row_scale, tiles_each)()


def bound_decode_by(
    geometry: Geometry,
    packed: Packed,
    out: torch.Tensor,
    terms: StackedTerms | None = None,
    row_scale: torch.Tensor | None = None,
    tiles_each: int | None = None,
) -> BoundLaunch:
    """`decode_by` made ready: what a search for better geometries times."""
    _require_output(packed, out, row_scale)
    width = out.shape[1]
    layout = _layout(packed, width, terms)
    static = _static(layout, geometry, OUTPUTS.get(out.dtype, "float"))
    stored = _stored(packed, out, terms)
    tiles_each = tiles_each or _tiles_each(layout, geometry)
    across = -(-width // geometry.cols)
    programs = layout.bands * -(-layout.band_rows // (tiles_each * geometry.rows))
    grid = (across, programs) if geometry.run else (across * programs,)
    kernel = gluon_decode_kernel if geometry.run else decode_kernel
    power = (None if terms is None else terms.power,) if geometry.run else ()
    arguments = (out, row_scale, *stored, *power, *_sizes(layout), out.stride(0), tiles_each)
    return BoundLaunch(kernel, grid, arguments, static, out.device)


def _geometry(packed: Packed, out: torch.Tensor, terms: StackedTerms | None) -> Geometry:
    """The chosen geometry, or what serves every chip: before Ampere, for float32 factors, in the interpreter."""
    short = terms is None or terms.up.dtype != torch.float32
    if short and HAS_GLUON and out.is_cuda and _has_bf16(out.device):
        ranks = 0 if terms is None else terms.up.shape[1]
        return chosen_geometry(packed.format, out.dtype, ranks, _capability(out.device) == HOPPER)
    return STORED_ONLY if terms is None else WITH_TERMS


def measure_row_scale(
    packed: Packed,
    row_scale: torch.Tensor,
    dtype: torch.dtype,
    width: int,
    terms: StackedTerms | None = None,
) -> None:
    """Write into `row_scale` (rows,) what one unit of fp8 or int8 code is worth in each row of W_eff (rows, width)."""
    measure_row_scale_by(ROW_SCALE if terms is None else ROW_SCALE_WITH_TERMS, packed, row_scale, dtype, width, terms)


def measure_row_scale_by(
    geometry: Geometry,
    packed: Packed,
    row_scale: torch.Tensor,
    dtype: torch.dtype,
    width: int,
    terms: StackedTerms | None = None,
) -> None:
    """`measure_row_scale` with a geometry of one's own."""
    _require_codes(dtype)
    _require_row_scale(packed, row_scale)
    layout = _layout(packed, width, terms)
    static = _static(layout, geometry)
    stored = _stored(packed, row_scale, terms)
    with torch.cuda.device_of(row_scale):
        row_scale_kernel[(layout.bands * -(-layout.band_rows // geometry.rows),)](
            row_scale, *stored, *_sizes(layout), LARGEST=LARGEST_CODE[dtype], **static
        )


def _layout(packed: Packed, width: int, terms: StackedTerms | None) -> _Layout:
    require_decodable(packed)
    _require_width(packed, width, terms)
    if terms is None:
        return _Layout(packed.format, packed.shape, width, packed.device)
    return _Layout(packed.format, packed.shape, width, packed.device, terms.up.dtype, terms.up.shape[1], terms.bands)


@cache
def _static(layout: _Layout, geometry: Geometry, output: str = "") -> dict[str, Any]:
    """The static choices and options of a launch, once a layout. Products and sums must not fuse: it changes bits."""
    known = READABLE[layout.storage]
    ranks = rank_step(layout.rank) if layout.rank else 0
    options: dict[str, Any] = {} if geometry.registers is None else {"maxnreg": geometry.registers}
    if output:
        options["OUTPUT"] = output
    if geometry.run:
        span = geometry.cols // known.width_multiple * known.block_bytes if geometry.ahead else 0
        options |= {"RUN": geometry.run, "KEPT": geometry.kept, "DOWN": geometry.down, "SPAN": span}
        options["WARPGROUP"] = geometry.warpgroup
    else:
        options |= {"PRECISION": _precision(layout), "STAGES": geometry.stages, "num_stages": 1}
    return {
        "FAMILY": known.family,
        "FORMAT": known.name,
        "BYTES": known.block_bytes,
        "RANKS": ranks,
        "LATER_RANKS": layout.rank > ranks,
        "ROWS": geometry.rows,
        "COLS": geometry.cols,
        "EVEN": layout.width == layout.shape[1] and layout.width % geometry.cols == 0,
        "num_warps": geometry.warps,
        "enable_fp_fusion": False,
        **options,
    }


@cache
def _sizes(layout: _Layout) -> tuple[int, int, int, int, int, int]:
    """`rows`, `width`, `stored_width`, `row_bytes`, `rank` and `band_rows`, as all kernels take them."""
    known = READABLE[layout.storage]
    rows, stored_width = layout.shape
    row_bytes = stored_width // known.width_multiple * known.block_bytes
    return rows, layout.width, stored_width, row_bytes, layout.rank, layout.band_rows


@cache
def _tiles_each(layout: _Layout, geometry: Geometry) -> int:
    """Tiles of a program, one below the other: as many as leave every multiprocessor its share of programs."""
    if geometry.programs is None:
        return 1
    down, across = -(-layout.band_rows // geometry.rows), -(-layout.width // geometry.cols)
    programs = geometry.programs * _multiprocessors(layout.device)
    return -(-down // max(1, programs // (across * layout.bands)))


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _stored(packed: Packed, target: torch.Tensor, terms: StackedTerms | None) -> tuple[torch.Tensor | None, ...]:
    """The stored parts and the factors, in the order of the kernels' arguments; all of them beside `target`."""
    stored = stored_parts(packed)
    _require_memory(packed, stored.codes)
    _require_one_device(packed, target, terms)
    factors = (None, None, None) if terms is None else (terms.up, terms.down, terms.scale)
    parts = (stored.codes, stored.scale, stored.nested_scale, stored.nested_offset, stored.levels, stored.nested_levels)
    return *parts, *factors


def _precision(layout: _Layout) -> str:
    """How float32 factors are multiplied; Turing has no TF32, and no bfloat16 at all."""
    device = layout.device
    old = device.type == "cuda" and not _has_bf16(device)
    if old and layout.factors == torch.bfloat16:
        raise InvalidOptionError(
            "bfloat16 low-rank factors cannot be multiplied on this GPU.",
            "Its tensor cores know float16 only; bfloat16 came with compute capability 8.0.",
            "Stack the terms in torch.float16 or torch.float32.",
        )
    return "ieee" if old else "tf32x3"


def _require_width(packed: Packed, width: int, terms: StackedTerms | None) -> None:
    if width < packed.shape[1] or (terms is not None and terms.shape != (packed.shape[0], width)):
        raise UnsupportedShapeError(
            f"A weight of shape {packed.shape} cannot be decoded to {width} columns"
            + ("." if terms is None else f" with low-rank terms of shape {terms.shape}."),
            "The output may be wider than the stored weight, never narrower, and terms have the shape of the output.",
            "Pass an output and terms of the layer's own width.",
        )


def _require_memory(packed: Packed, codes: torch.Tensor) -> None:
    apart = any(not tensor.is_contiguous() for tensor in packed.tensors.values())
    word, name = (8, "eight") if packed.format in ("Q4_K", "Q5_K") else (4, "four")
    if apart or codes.data_ptr() % word:
        raise InvalidOptionError(
            f"The bytes of a {packed.format} weight do not lie in memory as the decode kernels read them.",
            f"They read contiguous tensors in words of {name} bytes, from addresses that are multiples of {name}.",
            "Copy the tensors with .contiguous() or .clone() when they are views of a file or of a larger buffer.",
        )


def _require_one_device(packed: Packed, target: torch.Tensor, terms: StackedTerms | None) -> None:
    factors = () if terms is None else (terms.up, terms.down, terms.scale, terms.power)
    others = {tensor.device for tensor in (*packed.tensors.values(), *factors)}
    if others != {target.device}:
        found = sorted(str(device) for device in {target.device, *others})
        raise InvalidOptionError(
            f"A weight cannot be decoded across devices ({', '.join(found)}).",
            "A kernel runs on one device and reads and writes its memory only.",
            "Move the stored weight, the low-rank terms and the output to the same device first.",
        )


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Asked once a device: the answer comes from the driver."""
    return torch.cuda.get_device_capability(device)


def _has_bf16(device: torch.device) -> bool:
    """Whether it is Ampere or later: the products of `decode_gluon` and bfloat16."""
    return _capability(device) >= BF16_CAPABILITY


@cache
def _writes_fp8(device: torch.device) -> bool:
    """`has_fp8`, asked once a device: the answer comes from the driver."""
    return has_fp8(device)


def _require_codes(dtype: torch.dtype) -> None:
    if dtype not in LARGEST_CODE:
        raise InvalidOptionError(
            f"There is no row scale for {dtype}.",
            "Only 8-bit codes count in units of their row's scale.",
            f"Choose {' or '.join(str(known) for known in LARGEST_CODE)}.",
        )


def _require_row_scale(packed: Packed, row_scale: torch.Tensor) -> None:
    if row_scale.shape != packed.shape[:1] or row_scale.dtype != torch.float32 or not row_scale.is_contiguous():
        raise UnsupportedShapeError(
            f"A row scale of shape {tuple(row_scale.shape)} and type {row_scale.dtype} does not fit the weight.",
            f"The weight has {packed.shape[0]} rows, each with one float32 scale, side by side.",
            "Pass a contiguous float32 tensor of that length.",
        )


def _require_output(packed: Packed, out: torch.Tensor, row_scale: torch.Tensor | None) -> None:
    if out.dim() != 2 or out.shape[0] != packed.shape[0] or out.stride(1) != 1:
        raise UnsupportedShapeError(
            f"A weight of shape {packed.shape} cannot be decoded into a tensor of shape {tuple(out.shape)}.",
            "The output needs the same rows, with neighbours of a row side by side in memory.",
            "Pass a slice of rows of a contiguous buffer.",
        )
    if out.dtype not in (*FLOAT_TYPES, *LARGEST_CODE):
        raise InvalidOptionError(
            f"Weights cannot be decoded to {out.dtype}.",
            f"The output types are {', '.join(str(known) for known in (*FLOAT_TYPES, *LARGEST_CODE))}.",
            "Choose one of them.",
        )
    if (row_scale is None) == (out.dtype in LARGEST_CODE):
        raise InvalidOptionError(
            f"An output of {out.dtype} {'lacks' if row_scale is None else 'takes no'} row scale.",
            "fp8 and int8 codes count in units of their row's scale; floats are written as they are.",
            "Call measure_row_scale() and pass its result for fp8 and int8, and None otherwise.",
        )
    if out.dtype == torch.float8_e4m3fn and out.is_cuda and not _writes_fp8(out.device):
        raise InvalidOptionError(
            "fp8 weights cannot be written on this GPU.",
            "8-bit floats came with compute capability 8.9.",
            "Decode to bfloat16, float16 or int8 instead.",
        )
    if row_scale is not None:
        _require_row_scale(packed, row_scale)
