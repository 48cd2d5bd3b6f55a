"""How much of an adapter's change of a weight survives when the changed weight is stored in the layer's format again.

    D = sum_i scale_i * delta_i                   what the adapters add to a weight W while they are attached, (out, in)
    E = unpack(pack(W + D)) - (W + D)             what rounding into the storage format changes

    fidelity = 1 - |E| / |D|                      1: exact; 0: as far off as without the adapter; below 0: further off
    kept     = <D + E, D> / |D|^2                 how strongly the adapter still acts along its own direction

Norms are Frobenius'; several layers are taken as one long vector. `fidelity` is the headline, because it counts both
what rounding takes away and what it adds: `kept` alone may be 1 for a change that is drowned in noise of its own size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

LOW_FIDELITY = 0.8  # below, rounding changes the weights by more than a fifth of what the adapter changes
WORST_SHOWN = 3


@dataclass(frozen=True)
class LayerFidelity:
    """One layer's storage format, |D|, |E| and <E, D>."""

    storage: str
    change: float
    error: float
    overlap: float

    @property
    def fidelity(self) -> float:
        """See the formula above; 1 where there is nothing to change."""
        return _fidelity([self])

    @property
    def kept(self) -> float:
        """See the formula above; 1 where there is nothing to change."""
        return _kept([self])


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` did: scale by adapter, and the fidelity of each weight that was stored anew, by the layer's name.

    A layer of a text encoder has the encoder's name in front. `original_bytes` of host memory hold the weights as they
    were, for `unfuse`; `attached_bytes` are what the adapters took while they were attached.
    """

    adapters: Mapping[str, float]
    layers: Mapping[str, LayerFidelity]
    original_bytes: int
    attached_bytes: int

    @property
    def fidelity(self) -> float:
        """That of all layers together."""
        return _fidelity(self.layers.values())

    @property
    def kept(self) -> float:
        """That of all layers together."""
        return _kept(self.layers.values())

    def worst(self, count: int = WORST_SHOWN) -> dict[str, float]:
        """The lowest fidelities by layer, lowest first."""
        by_fidelity = sorted(self.layers.items(), key=lambda item: item[1].fidelity)
        return {name: layer.fidelity for name, layer in by_fidelity[:count]}

    @property
    def warning(self) -> str | None:
        """What to tell where too little survives, and the alternative; None where there is nothing to tell."""
        if self.fidelity >= LOW_FIDELITY:
            return None
        names = " and ".join(map(repr, self.adapters))
        storages = ", ".join(dict.fromkeys(layer.storage for layer in self.layers.values()))
        worst = ", ".join(f"{name} {value:.2f}" for name, value in self.worst().items())
        return (
            f"Fused into {storages}, {names} has a fidelity of {self.fidelity:.2f} and keeps {self.kept:.0%} of its "
            f"strength (1 is exact, 0 as far off as without it; worst: {worst}). The steps of the storage format are "
            "too coarse for so small a change. Kept attached it is exact, and costs "
            f"{self.attached_bytes / 1e6:.1f} MB: call unfuse(), or fuse into a model of a wider storage format."
        )


def _fidelity(layers: Iterable[LayerFidelity]) -> float:
    layers = list(layers)
    change, error = (math.hypot(*(getattr(layer, of) for layer in layers)) for of in ("change", "error"))
    if change == 0:
        return 1.0 if error == 0 else -math.inf
    return 1 - error / change


def _kept(layers: Iterable[LayerFidelity]) -> float:
    layers = list(layers)
    change = math.fsum(layer.change**2 for layer in layers)
    return 1 + math.fsum(layer.overlap for layer in layers) / change if change else 1.0
