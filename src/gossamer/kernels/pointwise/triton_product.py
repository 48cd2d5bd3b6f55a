"""Scales and bias of an int8 product in Triton; `product.py` is the specification.

A grid of one-row tiles, columns first, so that neighbouring programs read neighbouring memory; the scale of the columns
and the bias stay in the caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gossamer.kernels.pointwise.launch import power_of_two, require_shape, require_unit_stride, warps

TILE_LARGEST = 2048
VALUES_A_THREAD = 16


@triton.jit
def rescale_product_kernel(
    product: tl.tensor,  # (rows, columns) int32
    row_scale: tl.tensor,  # (rows,) contiguous
    column_scale: tl.tensor,  # (columns,)
    bias: tl.tensor,  # (columns,), or None
    out: tl.tensor,  # (rows, columns) contiguous
    columns: tl.tensor,
    row_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One tile of a row."""
    tiles = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    column = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    value = tl.load(product + row * row_stride + column, mask=inside, other=0).to(tl.float32)
    value = value * tl.load(row_scale + row) * tl.load(column_scale + column, mask=inside, other=0.0)
    if bias is not None:
        value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * columns + column, value.to(out.dtype.element_ty), mask=inside)


@torch.library.custom_op("gossamer::rescale_product", mutates_args=())
def rescale_product_op(
    product: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Opaque to torch.compile."""
    rows, columns = product.shape
    out = torch.empty(rows, columns, dtype=dtype, device=product.device)
    block = min(power_of_two(columns), TILE_LARGEST)
    with torch.cuda.device_of(product):
        rescale_product_kernel[(rows * -(-columns // block),)](
            product,
            row_scale,
            column_scale,
            bias,
            out,
            columns,
            product.stride(0),
            BLOCK=block,
            num_warps=warps(block, VALUES_A_THREAD),
        )
    return out


@rescale_product_op.register_fake
def _(
    product: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    return torch.empty(product.shape, dtype=dtype, device=product.device)


def rescale_product(
    product: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`product.rescale_product` in one pass."""
    rows, columns = product.shape
    require_shape((rows,), row_scale=row_scale)
    vectors = {"column_scale": column_scale} | ({"bias": bias} if bias is not None else {})
    require_shape((columns,), **vectors)
    require_unit_stride(product=product, row_scale=row_scale, **vectors)
    out: torch.Tensor = rescale_product_op(product, row_scale, column_scale, bias, dtype)
    return out
