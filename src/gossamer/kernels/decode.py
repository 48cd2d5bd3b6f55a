"""Decoding a packed weight, low-rank terms included, into a buffer that a library product reads: the Triton backend.

`decode_reference` is the same in torch. Import this module only where Triton is there and was chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gossamer.errors import InvalidOptionError, UnsupportedShapeError
from gossamer.formats import Packed
from gossamer.kernels.decode_kernel import decode_kernel, row_scale_kernel
from gossamer.kernels.decode_reference import FLOAT_TYPES, LARGEST_CODE
from gossamer.kernels.decode_support import Readable, has_fp8, require_decodable, stored_parts
from gossamer.kernels.low_rank import StackedTerms, rank_step

BF16_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Geometry:
    """Tile of a program and its warps."""

    rows: int
    cols: int
    warps: int


# 32 values a thread: four 16-byte stores of bf16 in flight, and runs of 512 values that are written side by side.
# Low-rank factors come from L2 once a tile, so tiles with terms are larger and squarer.
STORED_ONLY = Geometry(8, 512, 4)
WITH_TERMS = Geometry(64, 128, 4)
ROW_SCALE = Geometry(4, 512, 4)
ROW_SCALE_WITH_TERMS = Geometry(16, 128, 4)


def decode(
    packed: Packed,
    out: torch.Tensor,
    terms: StackedTerms | None = None,
    row_scale: torch.Tensor | None = None,
) -> None:
    """Write W_eff into `out` (rows, width): fp32, fp16 or bf16, or fp8 or int8 in units of `row_scale` (rows,).

    `out` may be a slice of rows of a larger buffer; where it is wider than the packed weight, the base has zeros there.
    `row_scale` is read, not written: `measure_row_scale` fills it, once for as long as weight and terms stay the same.
    A larger scale, such as a sum of bounds, is as good for fp8, whose step follows the value; codes beyond saturate.
    """
    known = require_decodable(packed)
    _require_output(packed, out, row_scale)
    _require_one_device(packed, out, terms)
    arguments = _arguments(packed, known, out.shape[1], terms)
    geometry = WITH_TERMS if terms is not None else STORED_ONLY
    tiles = -(-out.shape[0] // geometry.rows) * -(-out.shape[1] // geometry.cols)
    with torch.cuda.device_of(out):
        decode_kernel[(tiles,)](
            out=out,
            row_scale=row_scale,
            out_stride=out.stride(0),
            OUTPUT={torch.float8_e4m3fn: "fp8", torch.int8: "int8"}.get(out.dtype, "float"),
            **arguments,
            **_launch(packed, out.shape[1], geometry),
        )


def measure_row_scale(
    packed: Packed,
    row_scale: torch.Tensor,
    dtype: torch.dtype,
    width: int,
    terms: StackedTerms | None = None,
) -> None:
    """Write into `row_scale` (rows,) what one unit of fp8 or int8 code is worth in each row of W_eff (rows, width)."""
    known = require_decodable(packed)
    _require_codes(dtype)
    _require_row_scale(packed, row_scale)
    _require_one_device(packed, row_scale, terms)
    arguments = _arguments(packed, known, width, terms)
    geometry = ROW_SCALE_WITH_TERMS if terms is not None else ROW_SCALE
    with torch.cuda.device_of(row_scale):
        row_scale_kernel[(-(-packed.shape[0] // geometry.rows),)](
            row_scale=row_scale,
            LARGEST=LARGEST_CODE[dtype],
            **arguments,
            **_launch(packed, width, geometry),
        )


def _launch(packed: Packed, width: int, geometry: Geometry) -> dict[str, Any]:
    """Tile, warps, and whether every tile lies inside the matrix. Products and sums must not fuse: it changes bits."""
    return {
        "ROWS": geometry.rows,
        "COLS": geometry.cols,
        "EVEN": width == packed.shape[1] and width % geometry.cols == 0,
        "num_warps": geometry.warps,
        "num_stages": 1,
        "enable_fp_fusion": False,
    }


def _arguments(packed: Packed, known: Readable, width: int, terms: StackedTerms | None) -> dict[str, Any]:
    """What both kernels take: the stored parts, the factors, the sizes and the static choices."""
    out_features, in_features = packed.shape
    stored = stored_parts(packed)
    _require_width(packed, width, terms)
    _require_memory(packed, stored.codes)
    return {
        **{name: getattr(stored, name) for name in stored.__dataclass_fields__},
        "up": None if terms is None else terms.up,
        "down": None if terms is None else terms.down,
        "rank_scale": None if terms is None else terms.scale,
        "rows": out_features,
        "width": width,
        "stored_width": in_features,
        "row_bytes": in_features // known.width_multiple * known.block_bytes,
        "rank": 0 if terms is None else terms.up.shape[1],
        "FAMILY": known.family,
        "FORMAT": known.name,
        "BYTES": known.block_bytes,
        "RANKS": 0 if terms is None else rank_step(terms.up.shape[1]),
        "PRECISION": _precision(packed.device, terms),
    }


def _precision(device: torch.device, terms: StackedTerms | None) -> str:
    """How float32 factors are multiplied; Turing has no TF32, and no bfloat16 at all."""
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < BF16_CAPABILITY
    if old and terms is not None and terms.up.dtype == torch.bfloat16:
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
    if apart or codes.data_ptr() % 4:
        raise InvalidOptionError(
            f"The bytes of a {packed.format} weight do not lie in memory as the decode kernels read them.",
            "They read contiguous tensors in words of four bytes, from addresses that are multiples of four.",
            "Copy the tensors with .contiguous() or .clone() when they are views of a file or of a larger buffer.",
        )


def _require_one_device(packed: Packed, target: torch.Tensor, terms: StackedTerms | None) -> None:
    others = [*packed.tensors.values()] if terms is None else [*packed.tensors.values(), terms.up, terms.scale]
    found = sorted({str(tensor.device) for tensor in (target, *others)})
    if len(found) > 1:
        raise InvalidOptionError(
            f"A weight cannot be decoded across devices ({', '.join(found)}).",
            "A kernel runs on one device and reads and writes its memory only.",
            "Move the stored weight, the low-rank terms and the output to the same device first.",
        )


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
    if out.dtype == torch.float8_e4m3fn and out.is_cuda and not has_fp8(out.device):
        raise InvalidOptionError(
            "fp8 weights cannot be written on this GPU.",
            "8-bit floats came with compute capability 8.9.",
            "Decode to bfloat16, float16 or int8 instead.",
        )
    if row_scale is not None:
        _require_row_scale(packed, row_scale)
