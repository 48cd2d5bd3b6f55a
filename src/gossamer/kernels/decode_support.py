"""Which storage formats the decode kernels read, and how a Packed maps onto their arguments. Needs no Triton.

    family     formats                                   rows are made of
    plain      fp32 fp16 bf16                            single values
    fp8 ...    fp8, fp8_e5m2, int8                       single values, one scale a row
    four_bit   nf4 fp4 nf4-dq fp4-dq                     blocks of 64, none across two rows
    legacy     Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 IQ4_NL           blocks of 32
    k16        Q2_K Q3_K Q6_K                            super-blocks of 256 with scales of 16
    k32        Q4_K Q5_K IQ4_XS                          super-blocks of 256 with scales of 32

The other GGUF types (IQ1, IQ2, IQ3, TQ, MXFP4, NVFP4) do not occur in FLUX files and are decoded in torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import torch

from gossamer.errors import InvalidOptionError
from gossamer.formats import Packed
from gossamer.formats.dynamic_map import dynamic_map
from gossamer.formats.four_bit import BLOCK, VALUES
from gossamer.formats.gguf.block_types import BLOCK_TYPES
from gossamer.formats.gguf.iq_codebooks import iq4_values

FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True)
class Readable:
    """A format that the kernels read: a row is made of blocks of `width_multiple` codes in `block_bytes` bytes."""

    name: str
    family: str
    width_multiple: int
    block_bytes: int


def _gguf(family: str, *names: str) -> list[Readable]:
    types = [BLOCK_TYPES[name] for name in names]
    return [Readable(known.name, family, known.elements, known.block_bytes) for known in types]


_ROWS = (
    *(Readable(name, "plain", 1, size) for name, size in (("fp32", 4), ("fp16", 2), ("bf16", 2))),
    *(Readable(name, name, 1, 1) for name in ("fp8", "fp8_e5m2", "int8")),
    *(Readable(name, "four_bit", BLOCK, BLOCK // 2) for name in ("nf4", "fp4", "nf4-dq", "fp4-dq")),
    *_gguf("legacy", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"),
    *_gguf("k16", "Q2_K", "Q3_K", "Q6_K"),
    *_gguf("k32", "Q4_K", "Q5_K", "IQ4_XS"),
)

READABLE: Mapping[str, Readable] = MappingProxyType({row.name: row for row in _ROWS})


def why_not_decodable(storage: str, in_features: int) -> str | None:
    """The reason why a weight of this format and width has to be decoded in torch, or None when the kernels read it."""
    if storage not in READABLE:
        return f"the decode kernels do not read {storage}, only {', '.join(READABLE)}"
    multiple = READABLE[storage].width_multiple
    if in_features % multiple:
        return f"{storage} has blocks of {multiple}, and rows of {in_features} do not begin with a whole one"
    return None


def decodable(storage: str, in_features: int) -> bool:
    """Whether the decode kernels read a weight of this format and width."""
    return why_not_decodable(storage, in_features) is None


def require_decodable(packed: Packed) -> Readable:
    """The format's row of the table, or the reason why there is none."""
    reason = why_not_decodable(packed.format, packed.shape[1])
    if reason is not None:
        raise InvalidOptionError(
            f"A {packed.format} weight of shape {packed.shape} cannot be decoded by the Triton kernels.",
            reason[0].upper() + reason[1:] + ".",
            "Ask why_not_decodable() first and decode such a weight in torch.",
        )
    return READABLE[packed.format]


@dataclass(frozen=True)
class Stored:
    """The tensors of a Packed under the names of the kernels' arguments; None where the format has no such part."""

    codes: torch.Tensor
    scale: torch.Tensor | None = None
    nested_scale: torch.Tensor | None = None
    nested_offset: torch.Tensor | None = None
    levels: torch.Tensor | None = None
    nested_levels: torch.Tensor | None = None


def has_fp8(device: torch.device) -> bool:
    """Whether the chip converts to and from e4m3; Triton's interpreter does it wrongly, so a CPU counts as without."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


@cache
def _four_bit_levels(kind: str, device: torch.device) -> torch.Tensor:
    # made outside inference mode, a cached table also serves a later call that records gradients
    with torch.inference_mode(False):
        return torch.tensor(VALUES[kind], dtype=torch.float32, device=device)


def stored_parts(packed: Packed) -> Stored:
    """The arguments that describe the stored bytes; eight-bit floats are bytes where the chip lacks the type."""
    tensors, storage = packed.tensors, packed.format
    family = READABLE[storage].family
    if family == "plain":
        return Stored(tensors["values"])
    if family == "fp8_e5m2" or (family == "fp8" and not has_fp8(packed.device)):
        return Stored(tensors["codes"].view(torch.uint8), tensors["scale"])
    if family in ("fp8", "int8"):
        return Stored(tensors["codes"], tensors["scale"])
    if family == "four_bit":
        levels = _four_bit_levels(storage.removesuffix("-dq"), packed.device)
        if "absmax" in tensors:
            return Stored(tensors["codes"], tensors["absmax"], levels=levels)
        nested = (tensors["absmax_codes"], tensors["absmax_scale"], tensors["absmax_offset"])
        return Stored(tensors["codes"], *nested, levels, dynamic_map(packed.device))
    return Stored(tensors["blocks"], levels=iq4_values(packed.device) if storage.startswith("IQ4") else None)
