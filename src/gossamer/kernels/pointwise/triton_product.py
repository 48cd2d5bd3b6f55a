"""Scales and bias of an int8 product in Triton; `product.py` is the specification.

A grid of one-row tiles, columns first, so that neighbouring programs read neighbouring memory; the scale of the columns
and the bias stay in the caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gossamer.kernels.operators import through_operator
from gossamer.kernels.pointwise.launch import (
    LOAD_VALUES,
    Launcher,
    Plan,
    power_of_two,
    require_shape,
    require_unit_stride,
    warps,
)

TILE_LARGEST = 1024


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
    TILES: tl.constexpr,  # in a row
) -> None:
    """One tile of a row."""
    row = (tl.program_id(0) // TILES).to(tl.int64)
    column = (tl.program_id(0) % TILES) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    value = tl.load(product + row * row_stride + column, mask=inside, other=0).to(tl.float32)
    value = value * tl.load(row_scale + row) * tl.load(column_scale + column, mask=inside, other=0.0)
    if bias is not None:
        value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * columns + column, value.to(out.dtype.element_ty), mask=inside)


def require_rescalable(
    product: torch.Tensor, row_scale: torch.Tensor, column_scale: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Refuse what does not fit."""
    rows, columns = product.shape
    require_shape((rows,), row_scale=row_scale)
    vectors = {"column_scale": column_scale} | ({"bias": bias} if bias is not None else {})
    require_shape((columns,), **vectors)
    require_unit_stride(product=product, row_scale=row_scale, **vectors)


def plan_rescale_product(
    product: torch.Tensor, row_scale: torch.Tensor, column_scale: torch.Tensor, bias: torch.Tensor | None, _: object
) -> Plan:
    """How the kernel is launched; refuses what does not fit."""
    require_rescalable(product, row_scale, column_scale, bias)
    rows, columns = product.shape
    block = min(power_of_two(columns), TILE_LARGEST)
    tiles = -(-columns // block)
    return Plan((rows * tiles, 1, 1), (columns, product.stride(0), block, tiles), warps(block, LOAD_VALUES, block))


rescale_product_launch = Launcher(rescale_product_kernel, plan_rescale_product)


def launch_rescale_product(
    product: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Run the kernel."""
    launch = rescale_product_launch(product, row_scale, column_scale, bias, options=(dtype,))
    out = torch.empty(product.shape, dtype=dtype, device=product.device)
    launch(product, row_scale, column_scale, bias, out)
    return out


@torch.library.custom_op("gossamer::rescale_product", mutates_args=())
def rescale_product_op(
    product: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Opaque to torch.compile."""
    return launch_rescale_product(product, row_scale, column_scale, bias, dtype)


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
    if not through_operator(product):
        return launch_rescale_product(product, row_scale, column_scale, bias, dtype)
    require_rescalable(product, row_scale, column_scale, bias)
    out: torch.Tensor = rescale_product_op(product, row_scale, column_scale, bias, dtype)
    return out
