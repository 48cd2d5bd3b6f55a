"""How faithful a storage format is: likeness to the float32 pictures of the embedded model, in dB of PSNR.

Means over 300 held-out captions, 20 steps, products in float32 in every row, on one H200
(`benchmarks/results/embedded_model-nvidia-h200-2026-11-20.json`; a test holds this table to that file). A small model
feels rounding more than a large one, so the figures order the formats and promise nothing of a large model's pictures.
The order is that of the forward errors of the full-size model where those were measured: int8 0.050 (bitsandbytes),
fp8 with fp8 products 0.092, NF4 0.318.

Products in eight bits round the activations as well: such a plan counts as no better than weights of that type. The
text encoders were not graded apart; their formats are ordered by the same figures.
"""

from __future__ import annotations

import math

from gossamer.errors import UnknownOptionError, UnknownStorageError
from gossamer.formats import find_format

PSNR = {
    "fp32": math.inf,
    "bf16": math.inf,
    "Q8_0": 47.3,
    "int8": 44.8,
    "Q6_K": 39.5,
    "fp8": 36.8,
    "Q5_K": 31.8,
    "fp8_e5m2": 30.5,
    "Q5_0": 30.3,
    "Q4_K": 26.8,
    "Q4_0": 26.0,
    "nf4-dq": 25.4,
    "nf4": 25.3,
    "fp4": 23.4,
    "Q3_K": 22.0,
    "Q2_K": 18.5,
}

# The least that a level accepts, by the format that reaches it just so. Of the embedded model's objects NF4 still gets
# 93.8 % right (fp32: 97.0), fp4 89.7 and Q3_K 77.8.
LEVELS = {"exact": "bf16", "high": "fp8", "good": "nf4", "any": "Q2_K"}


def fidelity(storage: str) -> float | None:
    """Of a format, in dB; None where nobody measured it."""
    return PSNR.get("fp32" if storage == "fp16" else storage)


def combined(*parts: str) -> float | None:
    """Of several formats together: that of the worst."""
    known = [fidelity(part) for part in parts]
    return None if any(each is None for each in known) else min(each for each in known if each is not None)


def least(name: str) -> float:
    """The dB that a level, or the format of that name, asks for."""
    if name in LEVELS:
        return PSNR[LEVELS[name]]
    try:
        found = fidelity(find_format(name).name)
    except UnknownStorageError as error:
        raise _unknown(name) from error
    if found is None:
        raise _unknown(name)
    return found


def _unknown(name: str) -> UnknownOptionError:
    return UnknownOptionError(
        f"{name!r} is no level of fidelity.",
        f"The levels are {', '.join(LEVELS)}; a storage format whose fidelity was measured does as well: "
        f"{', '.join(PSNR)}.",
        "Use 'good', which accepts formats down to NF4.",
    )


def show(decibels: float | None) -> str:
    """For people."""
    if decibels is None:
        return "not measured"
    return "same" if math.isinf(decibels) else f"{decibels:.1f} dB"
