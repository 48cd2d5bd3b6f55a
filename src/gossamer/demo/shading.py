"""Light on surfaces: a studio of soft boxes around a paper sweep, three materials, and the tone curve.

Colours are linear (B, 3, P); geometry comes as planes (B, 1, P).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.demo.solids import Vector, dot

SWEEP_NEAR, SWEEP_FAR = 0.4, -7.5  # z at which the floor begins and ends to turn into the far end's colour
POOL = 0.018  # how fast the floor darkens away from the middle, per squared unit
KNEE = 0.62  # where the tone curve leaves the straight line


def smoothstep(low: float, high: float, value: Tensor) -> Tensor:
    """0 below `low`, 1 above `high`, smooth between."""
    share = ((value - low) / (high - low)).clamp(0.0, 1.0)
    return share * share * (3.0 - 2.0 * share)


def paper(x: Tensor, z: Tensor, floor: Tensor, wall: Tensor) -> Tensor:
    """Albedo of the sweep at a point of the floor, with a soft pool of light in the middle."""
    far = 1.0 - smoothstep(SWEEP_FAR, SWEEP_NEAR, z)
    pool = torch.exp(-POOL * (x * x + 0.35 * z * z))
    return (floor + (wall - floor) * far) * (0.72 + 0.28 * pool)


def studio(direction: Vector, light: Vector, floor: Tensor, wall: Tensor, light_colour: Tensor) -> Tensor:
    """What a mirror sees in a direction where no object stands: the sweep, a bright ceiling, and two soft boxes."""
    x, y, z = direction
    neutral = 0.35 * wall + 0.65 * wall.mean(1, keepdim=True)
    ground = 0.45 * floor + 0.55 * floor.mean(1, keepdim=True)
    rise = smoothstep(-0.25, 0.30, y)
    ambient = (ground * 0.75 + 0.07) * (1.0 - rise) + (neutral * 0.5 + 0.24) * rise
    above = y.clamp_min(0.05)
    ceiling = box(x / above, z / above - 0.2, 0.85, 0.55) * smoothstep(0.05, 0.2, y)
    side_x, side_z = light[2], -light[0]
    length = (side_x * side_x + side_z * side_z).sqrt()
    side = dot(direction, (side_x / length, torch.zeros_like(length), side_z / length))
    forward = dot(direction, light)
    upward = (y - forward * light[1]) / length
    ahead = forward.clamp_min(0.05)
    key = box(side / ahead, upward / ahead, 0.34, 0.34) * smoothstep(0.05, 0.3, forward)
    strip = smoothstep(0.80, 0.93, -x * light[0].sign()) * smoothstep(-0.15, 0.15, y) * 0.7
    return ambient + light_colour * (2.6 * key) + 0.75 * ceiling + strip


def box(across: Tensor, up: Tensor, half_width: float, half_height: float) -> Tensor:
    """A soft-edged rectangle around the origin."""
    inside = (1.0 - smoothstep(half_width * 0.75, half_width * 1.25, across.abs())) * (
        1.0 - smoothstep(half_height * 0.75, half_height * 1.25, up.abs())
    )
    return inside


def schlick(cosine: Tensor) -> Tensor:
    """Growth of reflectance towards grazing angles, 0 straight on and 1 edge on."""
    return (1.0 - cosine).clamp(0.0, 1.0) ** 5


def diffuse(normal: Vector, light: Vector, key: Tensor, sky: Tensor, light_colour: Tensor, fill: Tensor) -> Tensor:
    """Light that a rough surface sends back, per unit of albedo.

    `key` is the share of the key light that arrives, `sky` the openness; the fill comes from above and from the viewer.
    """
    facing = dot(normal, light).clamp_min(0.0)
    around = 0.62 + 0.26 * normal[1] + 0.12 * normal[2]
    return light_colour * (0.86 * facing * key) + fill * (around * (0.16 + 0.84 * sky) * 1.35)


def open_floor(light: Vector, light_colour: Tensor, fill: Tensor) -> Tensor:
    """The light of `diffuse`, averaged over channels, on a floor where nothing stands: (B, 1, 1)."""
    one, zero = torch.ones_like(light[1]), torch.zeros_like(light[1])
    return diffuse((zero, one, zero), light, one, one, light_colour, fill).mean(1, keepdim=True)


def tone(light: Tensor) -> Tensor:
    """Filmic shoulder and sRGB transfer: linear light of any size to [0, 1)."""
    over = (light - KNEE).clamp_min(0.0)
    room = 1.0 - KNEE
    mapped = light.clamp(0.0, KNEE) + room * over / (over + room)
    return to_srgb(mapped)


def to_srgb(light: Tensor) -> Tensor:
    """Linear light in [0, 1] to sRGB."""
    return torch.where(light <= 0.0031308, 12.92 * light, 1.055 * light.clamp_min(1e-8) ** (1 / 2.4) - 0.055)
