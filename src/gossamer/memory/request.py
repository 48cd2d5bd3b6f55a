"""What a plan is asked for, and the plan itself, as records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gossamer.memory.adapter_cost import AdapterCost
from gossamer.memory.budget import Budget
from gossamer.memory.card import Card
from gossamer.memory.picture import Job
from gossamer.memory.placement import Placement
from gossamer.memory.subject import Subject

# Step caches are planned here as soon as there are any; until then every block runs in every step.
Cache = Literal["off"]
Kind = Literal["resident", "partial", "streamed"]


@dataclass(frozen=True)
class PlanRequest:
    """Everything that a plan depends on. `storage` and `text_storage` are None where they are free to be chosen.

    `compute` and `attention` are wishes of `kernels.wishes`, `least_fidelity` a level or format of `fidelity`,
    `offload` a name of `diffusers_names`.
    """

    subject: Subject
    card: Card
    budget: Budget
    job: Job
    adapters: tuple[AdapterCost, ...] = ()
    storage: str | None = None
    text_storage: str | None = None
    compute: str = "auto"
    least_fidelity: str = "good"
    offload: str = "auto"
    attention: str = "auto"

    @property
    def rank(self) -> int:
        """Of all adapters together."""
        return sum(adapter.rank for adapter in self.adapters)


@dataclass(frozen=True)
class Plan:
    """One way to run the model. `gpu_bytes` are bytes by phase, then by what takes them; the largest phase counts."""

    storage: str
    text_storage: str
    vae_storage: str
    compute: str
    activations: str
    attention: str
    cache: Cache
    placement: Placement
    blocks: int
    gpu_bytes: Mapping[str, Mapping[str, int]]
    host_bytes: int
    disk_bytes: int
    step_seconds: float
    total_seconds: float
    fidelity: float | None
    fits: bool
    reasons: tuple[str, ...] = ()

    @property
    def worst_phase(self) -> str:
        """The phase that takes most of the GPU."""
        return max(self.gpu_bytes, key=lambda phase: sum(self.gpu_bytes[phase].values()))

    @property
    def peak_gpu_bytes(self) -> int:
        """Most that tensors take at once."""
        return sum(self.gpu_bytes[self.worst_phase].values())

    @property
    def kind(self) -> Kind:
        """How much of the transformer stays on the GPU."""
        if self.placement.resident_blocks == self.blocks:
            return "resident"
        return "partial" if self.placement.resident_blocks else "streamed"

    @property
    def summary(self) -> str:
        """The plan in a line."""
        some = f"{self.placement.resident_blocks} of {self.blocks}"
        return (
            f"{self.storage} weights, {self.compute} products, {'all' if self.kind == 'resident' else some} blocks "
            f"resident; text encoders {self.text_storage}, {self.placement.text}; VAE {self.placement.vae}; "
            f"{self.attention} attention; about {self.step_seconds:.3g} s a step, {self.total_seconds:.3g} s in all"
        )

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "storage": self.storage,
            "text_storage": self.text_storage,
            "vae_storage": self.vae_storage,
            "compute": self.compute,
            "attention": self.attention,
            "cache": self.cache,
            "placement": self.kind,
            "resident_blocks": self.placement.resident_blocks,
            "blocks": self.blocks,
            "slots": self.placement.slots,
            "pinned": self.placement.pinned,
            "text": self.placement.text,
            "vae": self.placement.vae,
            "modulation": self.placement.modulation,
            "peak_gpu_bytes": self.peak_gpu_bytes,
            "gpu_bytes": {phase: dict(parts) for phase, parts in self.gpu_bytes.items()},
            "host_bytes": self.host_bytes,
            "disk_bytes": self.disk_bytes,
            "step_seconds": self.step_seconds,
            "total_seconds": self.total_seconds,
            "fits": self.fits,
            "reasons": list(self.reasons),
        }


@dataclass(frozen=True)
class Refused:
    """What cannot work, or is never better, and what works instead."""

    what: str
    why: str
    instead: str


@dataclass(frozen=True)
class Planning:
    """The chosen plan, all plans from the best to the worst, the chosen one first, and what was refused."""

    chosen: Plan
    plans: tuple[Plan, ...]
    refused: tuple[Refused, ...]
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "chosen": self.chosen.as_json(),
            "plans": [plan.as_json() for plan in self.plans],
            "refused": [{"what": each.what, "why": each.why, "instead": each.instead} for each in self.refused],
            "notes": list(self.notes),
        }
