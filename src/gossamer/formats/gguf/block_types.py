"""Every GGUF type in one table: its block, and the functions that decode and encode it. A new type is a new row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from gossamer.errors import UnknownStorageError, UnsupportedShapeError
from gossamer.formats.gguf import float4, iq4, iq_unpack, k_pack, k_unpack, legacy, plain, ternary

Codec = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class BlockType:
    """A type: `elements` weights take `block_bytes` bytes.

    `decode` maps blocks (n, block_bytes) uint8 to (n, elements) float32 and `encode` back; `encode` is None where only
    reading is supported.
    """

    name: str
    elements: int
    block_bytes: int
    decode: Codec
    encode: Codec | None = None

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of `width` weights."""
        if width % self.elements:
            raise UnsupportedShapeError(
                f"A row of {width} weights cannot be stored as {self.name}.",
                f"{self.name} stores blocks of {self.elements}, and {width} is not a multiple of that.",
                "Choose a format without that limit (nf4, fp8, int8, bf16); for data from a file, check its shape.",
            )
        return width // self.elements * self.block_bytes


_ROWS = (
    BlockType("F32", 1, 4, plain.decode_f32),
    BlockType("F16", 1, 2, plain.decode_f16),
    BlockType("BF16", 1, 2, plain.decode_bf16),
    BlockType("Q4_0", 32, 18, legacy.decode_q4_0, legacy.encode_q4_0),
    BlockType("Q4_1", 32, 20, legacy.decode_q4_1, legacy.encode_q4_1),
    BlockType("Q5_0", 32, 22, legacy.decode_q5_0, legacy.encode_q5_0),
    BlockType("Q5_1", 32, 24, legacy.decode_q5_1, legacy.encode_q5_1),
    BlockType("Q8_0", 32, 34, legacy.decode_q8_0, legacy.encode_q8_0),
    BlockType("Q2_K", 256, 84, k_unpack.decode_q2_k, k_pack.encode_q2_k),
    BlockType("Q3_K", 256, 110, k_unpack.decode_q3_k, k_pack.encode_q3_k),
    BlockType("Q4_K", 256, 144, k_unpack.decode_q4_k, k_pack.encode_q4_k),
    BlockType("Q5_K", 256, 176, k_unpack.decode_q5_k, k_pack.encode_q5_k),
    BlockType("Q6_K", 256, 210, k_unpack.decode_q6_k, k_pack.encode_q6_k),
    BlockType("IQ4_NL", 32, 18, iq4.decode_iq4_nl, iq4.encode_iq4_nl),
    BlockType("IQ4_XS", 256, 136, iq4.decode_iq4_xs, iq4.encode_iq4_xs),
    BlockType("IQ1_S", 256, 50, iq_unpack.decode_iq1_s),
    BlockType("IQ1_M", 256, 56, iq_unpack.decode_iq1_m),
    BlockType("IQ2_XXS", 256, 66, iq_unpack.decode_iq2_xxs),
    BlockType("IQ2_XS", 256, 74, iq_unpack.decode_iq2_xs),
    BlockType("IQ2_S", 256, 82, iq_unpack.decode_iq2_s),
    BlockType("IQ3_XXS", 256, 98, iq_unpack.decode_iq3_xxs),
    BlockType("IQ3_S", 256, 110, iq_unpack.decode_iq3_s),
    BlockType("TQ1_0", 256, 54, ternary.decode_tq1_0),
    BlockType("TQ2_0", 256, 66, ternary.decode_tq2_0),
    BlockType("MXFP4", 32, 17, float4.decode_mxfp4),
    BlockType("NVFP4", 64, 36, float4.decode_nvfp4),
)

BLOCK_TYPES: Mapping[str, BlockType] = MappingProxyType({row.name: row for row in _ROWS})


def block_type(name: str) -> BlockType:
    """The type of that name."""
    if name not in BLOCK_TYPES:
        raise UnknownStorageError(
            f"There is no GGUF type named {name!r}.",
            "Known types: " + ", ".join(BLOCK_TYPES) + ".",
            "Use one of these names, in capitals.",
        )
    return BLOCK_TYPES[name]
