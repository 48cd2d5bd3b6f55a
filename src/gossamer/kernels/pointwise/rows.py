"""Rows: activations as a product reads them, and the one rounding that makes them.

Storage:
    values  (..., width)   bfloat16, float16 or float32; or codes, float8_e4m3fn or int8
    scale   (...)          float32, one a row, only beside codes: max(amax of the row, 2^-64) / largest code

Range: float8_e4m3fn to 448, int8 to 127 (-128 is never written).
Formula: x = codes * scale[..., None]; codes = round(x * (1 / scale)), to nearest, ties to even

The floor of 2^-64 keeps 1 / scale finite: a row of zeros gets codes of zero. A row that holds a NaN or an infinity has
that in its scale, so no quantised type can hide one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gossamer.errors import InvalidOptionError

AMAX_FLOOR = 2.0**-64

# by code type: the largest code
LARGEST_CODE = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Rows:
    """Activations (..., width): plain values, or codes with one float32 scale a row."""

    values: torch.Tensor
    scale: torch.Tensor | None = None

    def dequantize(self) -> torch.Tensor:
        """The values in float32."""
        values = self.values.float()
        return values if self.scale is None else values * self.scale[..., None]


def largest_code(dtype: torch.dtype) -> float | None:
    """Largest code of a row type; None where values are stored plainly. Refuses every other type."""
    if dtype in PLAIN_DTYPES:
        return None
    if dtype not in LARGEST_CODE:
        names = ", ".join(str(known).removeprefix("torch.") for known in (*PLAIN_DTYPES, *LARGEST_CODE))
        raise InvalidOptionError(
            f"rows cannot be stored as {str(dtype).removeprefix('torch.')}",
            "no product reads activations of that type",
            f"choose one of {names}",
        )
    return LARGEST_CODE[dtype]


def quantize_rows(x: torch.Tensor, dtype: torch.dtype) -> Rows:
    """Rows of `dtype` from x (..., width): float32 arithmetic, one rounding."""
    largest = largest_code(dtype)
    if largest is None:
        return Rows(x.to(dtype))
    values = x.float()
    scale = values.abs().amax(dim=-1).clamp_min(AMAX_FLOOR) / largest
    codes = values * (1.0 / scale)[..., None]
    return Rows((codes.round() if dtype == torch.int8 else codes).to(dtype), scale)


def empty_rows(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Rows:
    """Unwritten rows for a kernel to fill."""
    values = torch.empty(shape, dtype=dtype, device=device)
    if largest_code(dtype) is None:
        return Rows(values)
    return Rows(values, torch.empty(shape[:-1], dtype=torch.float32, device=device))


def to_operator(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as an operator returns them; where there is no scale, a tensor without elements stands for it."""
    return rows.values, rows.scale if rows.scale is not None else rows.values.new_empty(0, dtype=torch.float32)


def from_operator(values: torch.Tensor, scale: torch.Tensor) -> Rows:
    """Rows from what an operator returned."""
    return Rows(values, scale if values.dtype in LARGEST_CODE else None)
