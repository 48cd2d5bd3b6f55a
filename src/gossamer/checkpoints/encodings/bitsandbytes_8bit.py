"""LLM.int8() as bitsandbytes saves it, in folders of diffusers and transformers.

    tensor           dtype   shape
    x.weight         I8      (out, in)
    x.SCB            F32     (out,), largest magnitude of the row
    x.weight_format  U8      (), 0: rows; older versions also wrote orders of single GPU kinds

Formula: w = weight[o, i] * (SCB[o] / 127), which format int8 holds. bitsandbytes multiplies in another order
(weight * SCB, rounded, times a rounded 1/127), so its float32 results may differ in the last bits.

Source: Linear8bitLt and int8_vectorwise_dequant of bitsandbytes 0.50.
"""

from __future__ import annotations

from collections.abc import Collection

from gossamer.checkpoints.encodings.encoding import Encoding, beside
from gossamer.checkpoints.encodings.stored import matrix_of, read_floats, read_shaped, unknown
from gossamer.checkpoints.source import TensorSource
from gossamer.formats import Packed
from gossamer.formats.int8 import LARGEST

ROWS = 0  # the weight_format of plain rows


def find(source: TensorSource, names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Weights with row statistics beside them."""
    weights = (name.removesuffix("SCB") + "weight" for name in names if name.endswith(".SCB"))
    return {weight: beside(weight, ("SCB", "weight_format"), names) for weight in weights if weight in names}


def read(source: TensorSource, weight: str) -> Packed:
    """The stored codes as int8."""
    layer = weight.removesuffix("weight")
    _, rows, width = matrix_of(source, weight, ("I8",))
    _require_rows(source, weight, layer + "weight_format")
    scale = read_floats(source, weight, layer + "SCB", (rows,), (rows, 1)) / LARGEST
    return Packed("int8", {"codes": source.read(weight), "scale": scale}, (rows, width))


def _require_rows(source: TensorSource, weight: str, name: str) -> None:
    if name not in source.entries:
        return
    order = int(read_shaped(source, weight, name, ("U8", "I8", "I32", "I64"), ((), (1,))).reshape(-1)[0])
    if order != ROWS:
        raise unknown(
            weight,
            f"bitsandbytes int8 in the order {order}",
            "Only rows are read; bitsandbytes itself gave the other orders up.",
        )


ENCODING = Encoding("bitsandbytes 8-bit", find, read)
