"""What adapters take: bytes and ranks, from the headers of their files alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gossamer.adapters.families import not_an_adapter
from gossamer.adapters.spelling import Roles, recognise
from gossamer.checkpoints.safetensors_file import TensorEntry, read_header
from gossamer.errors import AdapterError, WrongModelError
from gossamer.models.flux_spec import FluxSpec

HELD_TWICE = 2  # a layer's own factors, and a copy side by side with those of other adapters, as the kernels read them


@dataclass(frozen=True)
class AdapterCost:
    """Of one adapter: its file's bytes, and its largest rank."""

    name: str
    nbytes: int
    rank: int

    @property
    def gpu_bytes(self) -> int:
        """On the GPU while it is attached."""
        return HELD_TWICE * self.nbytes


def adapter_cost(path: Path, spec: FluxSpec) -> AdapterCost:
    """Of the adapter in a safetensors file, for a model of the sizes in `spec`."""
    tensors = read_header(path).tensors
    keys = list(tensors)
    found = recognise(keys, spec)
    ranks = _ranks(found.modules.values(), tensors)
    if not ranks:
        raise not_an_adapter(str(path), keys) or AdapterError(
            f"{str(path)!r} cannot be planned for.",
            "It changes no layer of this transformer by low-rank factors, whose cost is known.",
            "Plan without it, or look at it with `gossamer inspect`.",
        )
    _require_width(path, found.modules.values(), tensors, spec)
    size = sum(entry.stop - entry.start for entry in tensors.values())
    return AdapterCost(path.name, size, max(ranks))


def _ranks(modules: Iterable[Roles], tensors: Mapping[str, TensorEntry]) -> list[int]:
    shapes = [tensors[roles["down"]].shape for roles in modules if "down" in roles]
    return [shape[0] for shape in shapes if shape]


def _require_width(path: Path, modules: Iterable[Roles], tensors: Mapping[str, TensorEntry], spec: FluxSpec) -> None:
    heights = {tensors[roles["up"]].shape[0] for roles in modules if "up" in roles}
    if heights and not any(height % spec.width == 0 for height in heights):
        raise WrongModelError(
            f"{str(path)!r} was made for a model of another size.",
            f"Its factors write {min(heights)} to {max(heights)} features; the model is {spec.width} wide.",
            "Use an adapter that was made for this model.",
        )
