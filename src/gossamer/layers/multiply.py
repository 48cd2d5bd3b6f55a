"""Products of an operand that is ready with rows of activations, through the library that an execution names."""

from __future__ import annotations

import torch

from gossamer.kernels.pointwise.rows import Rows
from gossamer.kernels.products import SCALED_PRODUCTS, matmul, matmul_gelu, matmul_int8
from gossamer.layers.execution import Execution
from gossamer.layers.operand import Operand


def multiply(
    execution: Execution, rows: Rows, weight: torch.Tensor, operand: Operand, out: torch.Tensor | None
) -> torch.Tensor:
    """One library product, written straight into `out` where its rows lie side by side."""
    target = _flat(out, execution.activations)
    codes = rows.values.reshape(-1, operand.width)
    if rows.scale is None:
        result = matmul(codes, weight, operand.bias, target)
    else:
        assert operand.scale is not None
        scaled = (codes, rows.scale.reshape(-1), weight, operand.scale, operand.bias, execution.activations, target)
        if execution.product == "int_mm":
            result = matmul_int8(*scaled, execution.pointwise.rescale_product)
        else:
            result = SCALED_PRODUCTS[execution.product](*scaled)
    shaped = result.view(*rows.values.shape[:-1], operand.rows)
    if out is None:
        return shaped
    return out if target is not None else out.copy_(shaped)


def multiply_gelu(
    x: torch.Tensor, weight: torch.Tensor, operand: Operand, plain: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `plain` outputs, and GELU of the others, which the library takes on the way: one product each."""
    bias = operand.bias
    head, tail = (None, None) if bias is None else (bias[:plain], bias[plain:])
    return matmul(x, weight[:plain], head), matmul_gelu(x, weight[plain:], tail)


def _flat(out: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """`out` as a matrix, or None where the product cannot write into it: scattered rows, or another type."""
    fit = out is not None and out.is_contiguous() and out.dtype == dtype
    return out.view(-1, out.shape[-1]) if out is not None and fit else None
