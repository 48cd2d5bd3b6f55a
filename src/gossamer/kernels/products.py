"""Products of activations (rows, in) with a weight (out, in): through the library of the chip, and in plain torch.

    matmul                 y = x @ w.T + bias                                           bf16, fp16, fp32
    matmul_gelu            y = gelu(x @ w.T + bias), in the library's own pass
    matmul_parts           y = [x_0, x_1, ...] @ w.T + bias, where the parts lie in places of their own
    scaled_mm_rowwise      y = (x @ w.T) * x_scale[:, None] * w_scale[None, :] + bias   e4m3 operands
    scaled_mm_tensorwise   the same, with the scales applied after the product
    int_mm                 the same for int8 operands, summed in int32
    reference              the same for both, in float32: the specification

Scales are float32, (rows,) and (out,): a row of values is its codes times its scale. torch hands a row-major (rows, in)
and a column-major (in, out) operand to the library; the transpose of a row-major (out, in) weight is the latter, so
nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol, TypeAlias

import torch
from torch.nn import functional as F

from gossamer.errors import UnsupportedShapeError
from gossamer.kernels.pointwise.product import rescale_product


class ScaledProduct(Protocol):
    """(rows, in) times (out, in), both with row scales: (rows, out), into `out` where it is given."""

    def __call__(
        self,
        x: torch.Tensor,
        x_scale: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
        out: torch.Tensor | None = None,
        /,
    ) -> torch.Tensor:
        """The result, which is `out` where it was given."""


# (product in int32, x_scale, weight_scale, bias, out_dtype) -> (rows, out)
Rescale: TypeAlias = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.dtype], torch.Tensor
]

FP8_MULTIPLE = 16  # `_scaled_mm` refuses other widths: its rows must start at multiples of 16 bytes
# With row scales on Hopper, cuBLAS has no kernel for up to 256 rows that are wide: reported at a width of 9216, not at
# 3072 (pytorch/ao issue 4582). FLUX.1-schnell multiplies 256 text tokens of 12288 values, so rows are added.
FP8_SAFE_WIDTH = 3072
FP8_LEAST_ROWS = 272
INT8_MULTIPLE = 8  # `_int_mm` refuses other widths on CUDA
INT8_LEAST_ROWS = 32  # `_int_mm` refuses up to 16 rows on CUDA, and cuBLAS has no kernel for some counts below 32
INT8_WIDEST = (2**31 - 1) // 127**2  # beyond this width a sum of products of codes can leave int32


def matmul(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x (..., in) times weight (out, in), into `out` (..., out) where it is given; all of one float type."""
    if out is None:
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    _write_product(out.view(-1, weight.shape[0]), rows, weight.t(), bias)
    return out


def _write_product(
    out: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """rows (n, in) times columns (in, out) + bias, into `out` (n, out)."""
    return torch.mm(rows, columns, out=out) if bias is None else torch.addmm(bias, rows, columns, out=out)


def matmul_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """GELU, in its tanh form, of x (..., in) times weight (out, in): (..., out); all of one float type.

    On CUDA cuBLASLt applies it to the sums before they are rounded, so that nothing is written, read and written again.
    torch's operator takes the other form of GELU on a CPU, so there it follows the product.
    """
    if not x.is_cuda:
        activated: torch.Tensor = torch.ops.aten.gelu_(F.linear(x, weight, bias), approximate="tanh")
        return activated
    given = x.new_zeros(weight.shape[0]) if bias is None else bias
    rows = torch._addmm_activation(given, x.reshape(-1, x.shape[-1]), weight.t(), use_gelu=True)
    return rows.view(*x.shape[:-1], weight.shape[0])


def matmul_parts(parts: Sequence[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Parts (..., in_0), (..., in_1), ... side by side, times weight (out, in_0 + in_1 + ...): (..., out).

    One product a part, the widest first; each is added to the sum of those before it, which is rounded in between.
    """
    stops = list(accumulate(part.shape[-1] for part in parts))
    pairs = [
        (part.reshape(-1, part.shape[-1]), weight[:, stop - part.shape[-1] : stop].t())
        for part, stop in zip(parts, stops, strict=True)
    ]
    (rows, columns), *others = sorted(pairs, key=lambda pair: -pair[0].shape[-1])
    total = _write_product(rows.new_empty(rows.shape[0], weight.shape[0]), rows, columns, bias)
    for rows, columns in others:
        total.addmm_(rows, columns)
    return total.view(*parts[0].shape[:-1], weight.shape[0])


def shape_obstacle(compute: str, shape: tuple[int, int]) -> str | None:
    """Why a weight of this shape (out, in) cannot be multiplied in a compute type, or None."""
    multiple = {"fp8": FP8_MULTIPLE, "int8": INT8_MULTIPLE}.get(compute, 1)
    if any(side % multiple for side in shape):
        return f"{compute} products need widths divisible by {multiple}, and this layer is {shape[0]} x {shape[1]}"
    if compute == "int8" and shape[1] > INT8_WIDEST:
        return f"sums over {shape[1]} int8 products can leave int32; {INT8_WIDEST} is the widest that is safe"
    return None


def scaled_matmul_fp8(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """e4m3 codes times e4m3 codes, both scales applied by the library before it rounds.

    bf16 is the one result type that the kernels of every chip have had since torch 2.9.
    """
    _require_shape("fp8", weight)
    count = x.shape[0]
    if count < FP8_LEAST_ROWS and x.shape[1] > FP8_SAFE_WIDTH:
        added = FP8_LEAST_ROWS - count
        x = F.pad(x.view(torch.uint8), (0, 0, 0, added)).view(x.dtype)  # the byte 0 is the value 0
        x_scale = F.pad(x_scale, (0, added))
    late_bias = bias if out_dtype == torch.float32 else None  # CUDA fuses no bias into a float32 result
    direct = out is not None and late_bias is None and out.shape[0] == x.shape[0]
    product = torch._scaled_mm(
        x,
        weight.t(),
        scale_a=x_scale[:, None],
        scale_b=weight_scale[None, :],
        bias=None if late_bias is not None else bias,
        out_dtype=out_dtype,
        use_fast_accum=True,  # Hopper then sums in fewer than 32 bits, as torchao's row-scaled fp8 inference does
        **({"out": out} if direct else {}),
    )
    if direct:
        return product
    return _into(out, product[:count] if late_bias is None else product[:count].add_(late_bias))


def scaled_matmul_fp8_tensorwise(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """e4m3 codes times e4m3 codes without scales, which then follow in place, each step rounded to the type between.

    Sums of codes reach 448 * 448 * in, about 3e9 in FLUX: too large for fp16, so only bf16 results stay narrow between.
    """
    _require_shape("fp8", weight)
    between = torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32
    one = torch.ones((), device=x.device)
    product = torch._scaled_mm(x, weight.t(), scale_a=one, scale_b=one, out_dtype=between, use_fast_accum=True)
    product.mul_(x_scale[:, None]).mul_(weight_scale)
    return _into(out, (product if bias is None else product.add_(bias)).to(out_dtype))


def matmul_int8(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    out: torch.Tensor | None = None,
    rescale: Rescale = rescale_product,
) -> torch.Tensor:
    """int8 codes times int8 codes, summed exactly in int32, scaled in float32 and rounded once, by `rescale`."""
    _require_shape("int8", weight)
    rows = x.shape[0]
    padded = F.pad(x, (0, 0, 0, INT8_LEAST_ROWS - rows)) if rows < INT8_LEAST_ROWS else x
    product = torch._int_mm(padded, weight.t())[:rows]
    return _into(out, rescale(product, x_scale, weight_scale, bias, out_dtype))


def scaled_matmul_reference(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the scaled products compute, for codes of any type: everything in float32, rounded once."""
    product = (x.float() @ weight.float().t()) * x_scale[:, None] * weight_scale
    return _into(out, (product if bias is None else product + bias).to(out_dtype))


def _into(out: torch.Tensor | None, result: torch.Tensor) -> torch.Tensor:
    return result if out is None else out.copy_(result)


SCALED_PRODUCTS: dict[str, ScaledProduct] = {
    "scaled_mm_rowwise": scaled_matmul_fp8,
    "scaled_mm_tensorwise": scaled_matmul_fp8_tensorwise,
    "reference": scaled_matmul_reference,
}


def _require_shape(compute: str, weight: torch.Tensor) -> None:
    obstacle = shape_obstacle(compute, (weight.shape[0], weight.shape[1]))
    if obstacle is not None:
        raise UnsupportedShapeError(
            f"This weight cannot be multiplied in {compute}.",
            f"{obstacle[:1].upper()}{obstacle[1:]}.",
            "Ask for the choice with this shape, which takes another compute type for it.",
        )
