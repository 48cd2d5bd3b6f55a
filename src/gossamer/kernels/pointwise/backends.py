"""The pointwise functions as one record, so that who runs a model chooses their backend once, before the first call.

`TORCH` is the specification and runs anywhere. `triton_functions()` imports Triton; whether the machine has it is asked
before, because nothing here falls back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.kernels.pointwise import gelu, modulate, product, rotary, rows
from gossamer.kernels.pointwise.modulate import Modulation
from gossamer.kernels.pointwise.rotary import HeadNorm, Rotation, TextNorm
from gossamer.kernels.pointwise.rows import Rows


@dataclass(frozen=True)
class Pointwise:
    """Every pointwise function of a FLUX block, in one backend; each does what the torch function of its name does."""

    name: str
    norm_modulate: Callable[[Tensor, Modulation, torch.dtype], Rows]
    residual_gate_: Callable[[Tensor, Tensor, Tensor], Tensor]
    residual_gate_norm_modulate_: Callable[[Tensor, Tensor, Tensor, Modulation, torch.dtype], Rows]
    qk_norm_rope_: Callable[[Tensor, Rotation, HeadNorm, TextNorm | None], Tensor]
    gelu_rows: Callable[[Tensor, torch.dtype], Rows]
    gelu_concat: Callable[[Tensor, Tensor, torch.dtype], Rows]
    quantize_rows: Callable[[Tensor, torch.dtype], Rows]
    rescale_product: Callable[[Tensor, Tensor, Tensor, Tensor | None, torch.dtype], Tensor]


TORCH = Pointwise(
    "torch",
    modulate.norm_modulate,
    modulate.residual_gate_,
    modulate.residual_gate_norm_modulate_,
    rotary.qk_norm_rope_,
    gelu.gelu_rows,
    gelu.gelu_concat,
    rows.quantize_rows,
    product.rescale_product,
)


def triton_functions() -> Pointwise:
    """The Triton kernels; their operators `gossamer::...` are registered by this import."""
    from gossamer.kernels.pointwise import triton_gelu, triton_modulate, triton_product, triton_rotary

    return Pointwise(
        "triton",
        triton_modulate.norm_modulate,
        triton_modulate.residual_gate_,
        triton_modulate.residual_gate_norm_modulate_,
        triton_rotary.qk_norm_rope_,
        triton_gelu.gelu_rows,
        triton_gelu.gelu_concat,
        triton_gelu.quantize_rows,
        triton_product.rescale_product,
    )
