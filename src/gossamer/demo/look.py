"""The tables behind the look: colours, materials, backdrops and lights, and a scene packed into tensors by them.

Colours are written as sRGB, the way a person picks them, and packed as linear light.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from gossamer.demo.scene import HALF_HEIGHT, Scene, Solid
from gossamer.demo.solids import Solids, Vector, profile

RGB = tuple[float, float, float]

ALBEDOS: dict[str, RGB] = {
    "red": (0.86, 0.09, 0.12),
    "orange": (0.98, 0.46, 0.04),
    "yellow": (0.99, 0.83, 0.08),
    "green": (0.22, 0.70, 0.24),
    "teal": (0.02, 0.66, 0.66),
    "blue": (0.10, 0.27, 0.88),
    "purple": (0.52, 0.19, 0.78),
    "white": (0.95, 0.95, 0.95),
}


@dataclass(frozen=True)
class Finish:
    """How a material answers light: share of diffuse light, reflectance straight on, and that of its velvet rim."""

    diffuse: float
    mirror: float  # reflectance of a clear coat at normal incidence
    tinted: float  # reflectance in the object's own colour
    velvet: float


FINISHES = {
    "matte": Finish(diffuse=1.0, mirror=0.0, tinted=0.0, velvet=0.16),
    "glossy": Finish(diffuse=0.95, mirror=0.07, tinted=0.0, velvet=0.0),
    "metal": Finish(diffuse=0.42, mirror=0.0, tinted=0.95, velvet=0.0),
}


@dataclass(frozen=True)
class Backdrop:
    """A seamless paper sweep: its floor near the viewer and its far end."""

    floor: RGB
    wall: RGB


BACKDROPS = {
    "grey": Backdrop((0.70, 0.70, 0.71), (0.50, 0.51, 0.53)),
    "sky": Backdrop((0.70, 0.80, 0.90), (0.45, 0.62, 0.80)),
    "sand": Backdrop((0.84, 0.76, 0.65), (0.70, 0.58, 0.45)),
    "rose": Backdrop((0.87, 0.72, 0.73), (0.74, 0.52, 0.56)),
    "mint": Backdrop((0.72, 0.84, 0.77), (0.50, 0.69, 0.60)),
    "night": Backdrop((0.23, 0.25, 0.33), (0.10, 0.11, 0.17)),
}


@dataclass(frozen=True)
class Light:
    """The key light's direction and colour, and the strength of what fills its shadows."""

    towards: tuple[float, float, float]
    colour: RGB
    fill: RGB


LIGHTS = {
    "left": Light((-0.70, 0.85, 0.45), (1.04, 1.02, 1.00), (0.42, 0.43, 0.45)),
    "right": Light((0.70, 0.85, 0.45), (1.04, 1.02, 1.00), (0.42, 0.43, 0.45)),
    "front": Light((0.12, 0.95, 0.75), (1.00, 1.00, 1.00), (0.42, 0.42, 0.43)),
    "sunset": Light((0.92, 0.58, 0.40), (1.22, 0.98, 0.76), (0.40, 0.38, 0.42)),
}


@dataclass(frozen=True)
class SceneBatch:
    """B scenes of at most K solids as float32 tensors; colours are linear.

    A slot without a solid holds a tiny ball far below the floor, which no ray of the camera or of a light meets.
    """

    solids: Solids  # planes (B, K, 1)
    present: Tensor  # (B, K), bool
    albedo: Tensor  # (B, K, 3)
    finish: Tensor  # (B, K, 4): diffuse, mirror, tinted, velvet
    floor: Tensor  # (B, 3, 1)
    wall: Tensor  # (B, 3, 1)
    light: Tensor  # (B, 3), unit direction towards the key light
    light_colour: Tensor  # (B, 3, 1)
    fill: Tensor  # (B, 3, 1)

    def __len__(self) -> int:
        return self.light.shape[0]

    def __getitem__(self, part: slice) -> SceneBatch:
        return self.each(lambda tensor: tensor[part])

    @property
    def light_vector(self) -> Vector:
        """The direction towards the key light as planes (B, 1, 1)."""
        x, y, z = self.light[:, :, None, None].unbind(1)
        return x, y, z

    def each(self, change: Callable[[Tensor], Tensor]) -> SceneBatch:
        """The same batch with `change` applied to every tensor."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "solids"}
        solids = Solids(*(change(plane) for plane in self.solids))
        return SceneBatch(solids=solids, **{name: change(value) for name, value in values.items()})


def linear(colour: RGB) -> list[float]:
    """sRGB to linear light."""
    return [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in colour]


def pack_scenes(scenes: Sequence[Scene], device: torch.device | str = "cpu") -> SceneBatch:
    """Scenes as tensors, with as many slots for solids as the fullest scene needs."""
    slots = max(len(scene.solids) for scene in scenes)
    rows = [[*scene.solids, *[None] * (slots - len(scene.solids))] for scene in scenes]
    lights = [LIGHTS[scene.light] for scene in scenes]
    backdrops = [BACKDROPS[scene.backdrop] for scene in scenes]

    def tensor(values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    return SceneBatch(
        solids=Solids(*tensor([[_placed(solid) for solid in row] for row in rows])[..., None].unbind(2)),
        present=torch.tensor([[solid is not None for solid in row] for row in rows], device=device),
        albedo=tensor([[linear(ALBEDOS[solid.colour]) if solid else [0.0] * 3 for solid in row] for row in rows]),
        finish=tensor([[_finish(solid) for solid in row] for row in rows]),
        floor=tensor([linear(backdrop.floor) for backdrop in backdrops])[:, :, None],
        wall=tensor([linear(backdrop.wall) for backdrop in backdrops])[:, :, None],
        light=torch.nn.functional.normalize(tensor([light.towards for light in lights]), dim=1),
        light_colour=tensor([light.colour for light in lights])[:, :, None],
        fill=tensor([light.fill for light in lights])[:, :, None],
    )


def _finish(solid: Solid | None) -> list[float]:
    if solid is None:
        return [0.0] * 4
    finish = FINISHES[solid.material]
    return [finish.diffuse, finish.mirror, finish.tinted, finish.velvet]


def _placed(solid: Solid | None) -> list[float]:
    """The thirteen planes of `Solids` for one slot."""
    if solid is None:
        return [0.0, -100.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.1, 0.1]
    square, ring, low, high, half, rounding, bound = profile(solid)
    side = (high - low) ** 2 + (2 * half) ** 2
    centre = solid.base + HALF_HEIGHT[solid.shape] * solid.radius
    place = [solid.x, centre, solid.z, math.cos(solid.turn), math.sin(solid.turn)]
    return [*place, square, ring, low, high - low, half, 1 / side if side else 0.0, rounding, bound]
