"""Seconds of a step and of a whole picture on a card that need not be there.

    step      = computing, or what `offload_timeline` makes of it where blocks are not resident
    computing = (linears / rate + attention / rate + pointwise bytes / bandwidth + decoded bytes / bandwidth) x overhead

Every rate is the card's peak times a factor of `efficiency`. Loading from disk is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gossamer.errors import InvalidOptionError
from gossamer.memory.activations import TYPE_BYTES
from gossamer.memory.card import Card
from gossamer.memory.efficiency import Factors, family
from gossamer.memory.model_cost import TransformerBytes
from gossamer.memory.model_specs import T5Spec, VaeSpec
from gossamer.memory.offload_carousel import Arrangement
from gossamer.memory.offload_timeline import step_with_copies
from gossamer.memory.picture import Job
from gossamer.memory.placement import VaePlacement
from gossamer.memory.work import (
    attention_operations,
    decoded_bytes,
    linear_operations,
    modulation_bytes,
    pointwise_bytes,
    t5_operations,
    vae_operations,
)
from gossamer.models.flux_spec import FluxSpec

DISK_BYTES_A_SECOND = 3e9  # assumed of the disk that weights are mapped from: an NVMe drive


@dataclass(frozen=True)
class Machine:
    """A card, what its kernels reach of its peaks, and how its products and its attention run."""

    card: Card
    factors: Factors
    compute: str
    activations: str
    attention: str

    @property
    def bus(self) -> float:
        """Bytes a second from pinned memory."""
        return self.card.bus * self.factors.bus


def product_seconds(machine: Machine, operations: float, compute: str) -> float:
    """Of library products in a compute type."""
    return operations / (machine.card.rate(compute) * machine.factors.products[compute])


def step_seconds(
    machine: Machine, spec: FluxSpec, job: Job, weights: TransformerBytes, rank: int, modulation_resident: bool
) -> float:
    """Of one step with all weights in place; `rank` is that of all attached adapters together."""
    factors, card = machine.factors, machine.card
    seconds = product_seconds(machine, linear_operations(spec, job), machine.compute)
    seconds += attention_seconds(machine, attention_operations(spec, job))
    moved = pointwise_bytes(spec, job, machine.activations, machine.compute)
    seconds += moved / (card.bandwidth * factors.pointwise)
    seconds += sum(_decode_seconds(machine, weights, storage, rank) for storage in weights.storages)
    if modulation_resident:
        moved = modulation_bytes(spec, weights, machine.activations)
        seconds += moved / (card.bandwidth * factors.modulation)
    return seconds * factors.overhead


def attention_seconds(machine: Machine, operations: float) -> float:
    """Of attention, whose scores and values are products in 16 bits."""
    share = machine.factors.attention_share(machine.attention, machine.card)
    if not share:
        raise InvalidOptionError(
            f"No time can be predicted for {machine.attention!r} attention.",
            "It writes all scores to memory, and nobody runs a model of this size with it.",
            "Choose a compute type of 16 bits or fewer.",
        )
    return operations / (machine.card.rate(machine.activations) * share)


def _decode_seconds(machine: Machine, weights: TransformerBytes, storage: str, rank: int) -> float:
    """Of writing all operands of one storage format; with adapters, also where nothing would have to be decoded."""
    factors = machine.factors
    moved = decoded_bytes(weights, storage, machine.compute)
    if rank and not moved:
        count = weights.storages[storage]
        moved = count * 2.0 * TYPE_BYTES[machine.compute]
    alone = moved / (machine.card.bandwidth * factors.decode[family(storage)])
    terms = factors.low_rank[family(storage)]
    return alone * (1 + (terms.fixed + terms.per_rank * rank if rank else 0.0))


def streamed_seconds(
    machine: Machine, computing: float, sizes: Sequence[int], arrangement: Arrangement, pinned: bool
) -> float:
    """Of a step some of whose blocks, of `sizes` bytes, come from the host or from a mapped file meanwhile."""
    rate = machine.bus if pinned else min(machine.bus, DISK_BYTES_A_SECOND)
    return step_with_copies(tuple(sizes), arrangement, rate, computing)


def prepass_seconds(machine: Machine, spec: FluxSpec, weights: TransformerBytes, resident: bool = False) -> float:
    """Of the modulation of a whole run: unless its weights are there, they come over the bus once."""
    moved = modulation_bytes(spec, weights, machine.activations)
    copied = 0 if resident else weights.modulation
    return copied / machine.bus + moved / (machine.card.bandwidth * machine.factors.modulation)


def text_seconds(machine: Machine, spec: T5Spec, job: Job, linear_weights: int, copied_bytes: float) -> float:
    """Of the T5 encoder, and of bringing so many bytes to the GPU first. CLIP's part does not show."""
    computing = product_seconds(machine, t5_operations(spec, job, linear_weights), machine.activations)
    return computing + copied_bytes / machine.bus


def vae_seconds(machine: Machine, spec: VaeSpec, job: Job, placement: VaePlacement) -> float:
    """Of decoding the pictures of a batch."""
    rate = machine.card.rate(machine.activations) * machine.factors.convolutions
    return vae_operations(spec, job, placement) / rate
