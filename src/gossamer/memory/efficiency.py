"""How much of a card's peak rates the kernels reach, derived from measured figures and nothing else.

`measured.json` holds what was timed on one card, and where each figure is from. A factor is what is reached there over
the peak of that card's data sheet, and is taken to be the same on every card. `benchmarks/roofline_table.py --calibrate
RECORD` puts the rows of a `flux_step` record into that file; every factor follows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.memory.card import Card
from gossamer.memory.cards import find_card
from gossamer.memory.model_cost import transformer_bytes
from gossamer.memory.model_specs import FLUX_DEV
from gossamer.memory.picture import Job
from gossamer.memory.work import (
    attention_operations,
    decoded_bytes,
    linear_operations,
    modulation_bytes,
    pointwise_bytes,
)

MEASURED = Path(__file__).parent / "measured.json"
JOB = Job()  # what was measured: FLUX.1-dev, 1024x1024, 512 text tokens

# Formats whose kernels have the same shape, by the one of them that was timed.
FAMILIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("int8", ("fp32", "fp16", "bf16", "fp8", "fp8_e5m2", "int8")),
    ("nf4", ("nf4", "nf4-dq", "fp4", "fp4-dq")),
    ("Q8_0", ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")),
    ("Q4_K", ()),
)

# What nobody measured here, as shares of the peak in 16 bits. Attention: FlashAttention-2 (arXiv 2307.08691) reports 50
# to 73 % on an A100, and about half of that for the memory-efficient kernel; flash on an H200: 310 TFLOP/s of 989.
# Convolutions: a guess on the safe side.
ASSUMED = {"flash": 0.6, "flash on Hopper": 310 / 989, "efficient": 0.3, "convolutions": 0.35}

# Microseconds of a call without a pause on one H200: of cuDNN over those of eight_bit, which norms and rotates queries
# and keys on the way, less those of norm and rotation alone.
EIGHT_BIT_GAIN = 449 / (371 - 35)


@dataclass(frozen=True)
class LowRankCost:
    """Low-rank terms add (`fixed` + `per_rank` x rank) times what decoding alone takes."""

    fixed: float
    per_rank: float


@dataclass(frozen=True)
class Factors:
    """Shares of peaks; `decode` and `low_rank` by family. `overhead` is a step's time over that of its kernels."""

    products: Mapping[str, float]
    attention: Mapping[str, float]
    pointwise: float
    modulation: float
    decode: Mapping[str, float]
    low_rank: Mapping[str, LowRankCost]
    overhead: float
    bus: float
    convolutions: float
    sources: tuple[str, ...]

    def attention_share(self, backend: str, card: Card) -> float:
        """Of the 16-bit peak, for a backend on a card."""
        on_hopper = f"{backend} on {card.capability.generation.name}"
        return self.attention.get(on_hopper, self.attention.get(backend, 0.0))


def read_measured(path: Path = MEASURED) -> dict[str, Any]:
    """The measured figures."""
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def family(storage: str) -> str:
    """The timed format whose kernel a format shares; K types and the other GGUF types share that of Q4_K."""
    return next((timed for timed, members in FAMILIES if storage in members), "Q4_K")


def factors(measured: Mapping[str, Any]) -> Factors:
    """Every factor, from the measured figures of one card."""
    card = find_card(measured["card"])
    kernels = {part: value / 1000 for part, value in measured["kernels_ms"].items()}
    steps = {row: value / 1000 for row, value in measured["steps_ms"].items()}
    overhead = steps[measured["kernels_of"]] / sum(kernels.values())
    modulation = modulated_bytes("fp8") / kernels["modulation"] / card.bandwidth
    pointwise = pointwise_bytes(FLUX_DEV, JOB, "bf16", "fp8") / kernels["pointwise"] / card.bandwidth
    attention = attention_operations(FLUX_DEV, JOB) / kernels["attention"] / card.fp16
    plain = (
        steps["bf16/bf16/none"] / overhead
        - kernels["attention"]
        - modulated_bytes("bf16") / (modulation * card.bandwidth)
    )
    plain -= pointwise_bytes(FLUX_DEV, JOB, "bf16", "bf16") / (pointwise * card.bandwidth)
    work = linear_operations(FLUX_DEV, JOB)
    sixteen = work / plain / card.bf16
    bus = measured["bus_bytes_per_second"] / card.bus
    decode = {timed: _decode_share(timed, steps, overhead, modulation, card) for timed, _ in FAMILIES}
    return Factors(
        products={
            "fp8": work / kernels["products"] / card.fp8,
            "bf16": sixteen,
            "fp16": sixteen,
            "fp32": sixteen,
            "int8": measured["int8_product_rate"] / card.int8,
        },
        attention={
            "cudnn": attention,
            "eight_bit": attention * EIGHT_BIT_GAIN,
            **{name: ASSUMED[name] for name in ("flash", "flash on Hopper", "efficient")},
        },
        pointwise=pointwise,
        modulation=modulation,
        decode=decode,
        low_rank=_low_rank(steps, overhead, decode, card),
        overhead=overhead,
        bus=bus,
        convolutions=ASSUMED["convolutions"],
        sources=tuple(measured[name] for name in measured if name.endswith("source")),
    )


def modulated_bytes(storage: str) -> float:
    """Bytes moved for the modulation in one step of what was measured: stored like the blocks, and in every step."""
    weights = transformer_bytes(FLUX_DEV, storage, modulation_storage=storage)
    return modulation_bytes(FLUX_DEV, weights, "bf16")


def _extra(row: str, steps: Mapping[str, float], overhead: float, modulation: float, card: Card) -> float:
    """Seconds that decoding takes in a row: its step, less the one that decodes nothing, less the modulation's part."""
    storage, compute, _ = row.split("/")
    base = steps[f"{compute}/{compute}/none"]
    return (steps[row] - base) / overhead - (modulated_bytes(storage) - modulated_bytes(compute)) / (
        modulation * card.bandwidth
    )


def _decode_share(timed: str, steps: Mapping[str, float], overhead: float, modulation: float, card: Card) -> float:
    """Of the bandwidth, over all measured rows of a format together."""
    rows = [row for row in steps if row.startswith(f"{timed}/") and row.endswith("/none")]
    moved = sum(decoded_bytes(transformer_bytes(FLUX_DEV, timed), timed, row.split("/")[1]) for row in rows)
    seconds = sum(_extra(row, steps, overhead, modulation, card) for row in rows)
    return moved / seconds / card.bandwidth


def _low_rank(
    steps: Mapping[str, float], overhead: float, decode: Mapping[str, float], card: Card
) -> dict[str, LowRankCost]:
    """From the rows with ranks 16 and 64; without one of rank 64 NF4's slope, without either NF4's cost."""
    costs: dict[str, LowRankCost] = {}
    for timed in ("nf4", *(name for name, _ in FAMILIES if name != "nf4")):
        base = f"{timed}/fp8/none"
        moved = decoded_bytes(transformer_bytes(FLUX_DEV, timed), timed, "fp8")
        alone = moved / (decode[timed] * card.bandwidth)
        ranks = {rank: steps.get(f"{timed}/fp8/r{rank}") for rank in (16, 64)}
        found = {rank: (step - steps[base]) / overhead / alone for rank, step in ranks.items() if step is not None}
        if 16 not in found:
            costs[timed] = costs["nf4"]
            continue
        slope = (found[64] - found[16]) / 48 if 64 in found else costs["nf4"].per_rank
        costs[timed] = LowRankCost(found[16] - 16 * slope, slope)
    return costs
