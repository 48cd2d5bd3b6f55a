"""fp32, fp16, bf16: the weight itself, rounded to nearest even when the type is narrower.

Storage:
    values   (out, in)   float32, float16 or bfloat16

Range: fp32 and bf16 reach 3.4e38, fp16 reaches 65504; a weight beyond that is refused, never stored as infinity.
Formula: w = values[o, i]
"""

from __future__ import annotations

from functools import partial

import torch

from gossamer.errors import InvalidOptionError
from gossamer.formats.checks import require_packable
from gossamer.formats.packed import Format, Packed

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def _pack(weight: torch.Tensor, *, storage: str) -> Packed:
    require_packable(weight, storage)
    values = weight.detach().to(DTYPES[storage], copy=True, memory_format=torch.contiguous_format)
    if not bool(torch.isfinite(values).all()):
        raise InvalidOptionError(
            f"A weight with values up to {float(weight.detach().abs().max()):.4g} cannot be stored as {storage}.",
            f"{storage} ends at {torch.finfo(DTYPES[storage]).max:.4g}; larger values would become infinite.",
            "Store this weight as bf16, which has the range of fp32.",
        )
    return Packed(storage, {"values": values}, (weight.shape[0], weight.shape[1]))


def unpack(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """The weight (out, in) in `dtype`; the stored tensor itself, not a copy, where it already has that type."""
    return packed.tensors["values"].to(dtype)


def hold(weight: torch.Tensor) -> Packed:
    """A weight as it is, neither copied nor checked, in the plain format of its own type."""
    storage = {dtype: name for name, dtype in DTYPES.items()}[weight.dtype]
    return Packed(storage, {"values": weight.detach()}, (weight.shape[0], weight.shape[1]))


def _packed_bytes(out_features: int, in_features: int, *, storage: str) -> int:
    return out_features * in_features * DTYPES[storage].itemsize


FORMATS = tuple(
    Format(name, partial(_pack, storage=name), unpack, partial(_packed_bytes, storage=name)) for name in DTYPES
)
