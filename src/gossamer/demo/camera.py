"""The one camera of the demo: a long lens in front of the scene, looking down by `PITCH` degrees."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gossamer.demo.solids import Vector

PITCH = 26.0  # degrees below the horizon
DISTANCE = 8.6  # from the eye to the target
TARGET_Y = 0.93  # height of the point that lands in the middle of the picture
VIEW = 0.22  # tangent of half the vertical field of view


@dataclass(frozen=True)
class Frame:
    """Height and width of a picture in pixels."""

    height: int
    width: int


def frame_of(size: int | tuple[int, int]) -> Frame:
    """A square frame, or (height, width)."""
    return Frame(size, size) if isinstance(size, int) else Frame(*size)


def eye() -> tuple[float, float, float]:
    """Where the camera stands, in world units."""
    pitch = math.radians(PITCH)
    return 0.0, TARGET_Y + DISTANCE * math.sin(pitch), DISTANCE * math.cos(pitch)


def rays(frame: Frame, device: torch.device) -> Vector:
    """Unit directions through the pixel centres, row by row: three planes (1, 1, height * width)."""
    rows = (torch.arange(frame.height, device=device, dtype=torch.float32) + 0.5) / frame.height
    columns = (torch.arange(frame.width, device=device, dtype=torch.float32) + 0.5) / frame.width
    up = ((1 - 2 * rows) * VIEW)[:, None].expand(frame.height, frame.width)
    right = ((2 * columns - 1) * VIEW * frame.width / frame.height)[None].expand_as(up)
    sine, cosine = math.sin(math.radians(PITCH)), math.cos(math.radians(PITCH))
    x, y, z = right, up * cosine - sine, -up * sine - cosine
    length = (x * x + y * y + z * z).sqrt()
    return tuple((plane / length).reshape(1, 1, -1) for plane in (x, y, z))  # type: ignore[return-value]


def project(x: float, y: float, z: float, frame: Frame) -> tuple[float, float]:
    """The (row, column) in pixels at which a point of the world appears; pixel centres lie at halves."""
    sine, cosine = math.sin(math.radians(PITCH)), math.cos(math.radians(PITCH))
    ex, ey, ez = eye()
    dx, dy, dz = x - ex, y - ey, z - ez
    depth = -dy * sine - dz * cosine
    up, right = (dy * cosine - dz * sine) / depth / VIEW, dx / depth / VIEW * frame.height / frame.width
    return (1 - up) / 2 * frame.height, (1 + right) / 2 * frame.width
