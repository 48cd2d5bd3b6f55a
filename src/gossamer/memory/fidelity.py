"""How faithful a storage format is: likeness to the float32 pictures of the embedded model, in dB of PSNR.

Means over 300 held-out captions, 20 steps, products in float32 in every row, on one H200
(`benchmarks/results/embedded_model-nvidia-h200-2026-11-20.json`; a test holds this table to that file). A small model
feels rounding more than a large one, so the figures order the formats and promise nothing of a large model's pictures.
The order is that of the forward errors of the full-size model with exact products where those were measured
(`benchmarks/results/flux_step-nvidia-h200-2026-11-20.json`): Q8_0 0.026, Q6_K 0.058, Q4_K 0.179.

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
    "int8": 45.4,
    "Q6_K": 39.3,
    "fp8": 37.6,
    "Q5_K": 33.3,
    "Q5_0": 31.8,
    "fp8_e5m2": 30.6,
    "Q4_K": 27.3,
    "Q4_0": 26.9,
    "nf4-dq": 26.1,
    "nf4": 25.9,
    "fp4": 24.1,
    "Q3_K": 24.0,
    "Q2_K": 19.6,
}

# The least that a level accepts, by the format that reaches it just so. Of the embedded model's objects NF4 still gets
# 95.3 % right (fp32: 97.0), fp4 91.5 and Q3_K 86.5.
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
