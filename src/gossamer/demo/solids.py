"""Signed distances of the five solids, as one closed form, in torch and elementwise.

Every solid is the set of points within `rounding` of a core. In the solid's own frame, with y up:

    u, v = max(|x| - square, 0), max(|z| - square, 0)      square half-width of the core; 0 but for a cube
    q    = | sqrt(u^2 + v^2) - ring |                      ring: radius of a torus' centre line; 0 for all others
    core = the trapezoid (q, y) from (low, -half) to (high, half)
    d    = distance of (q, y) to the core - rounding

A sphere is a point rounded by its radius, a torus a circle rounded by its tube, a cube a square post grown on all
sides, a cylinder and a cone trapezoids. Outside the distance is exact; inside the core it stays at -rounding.

Points are three planes (x, y, z), solids planes (B, K, 1), so that all of this broadcasts and fuses into one kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.demo.scene import HALF_HEIGHT, Solid

Vector = tuple[Tensor, Tensor, Tensor]  # x, y, z planes that broadcast with one another

TINY = 1e-12
ROUNDING = {"cube": 0.13, "cylinder": 0.10, "cone": 0.10}  # in units of the radius


class Solids(NamedTuple):
    """Placement and profile of solids; every field a plane (B, K, 1), lengths in world units."""

    x: Tensor
    y: Tensor
    z: Tensor
    cosine: Tensor
    sine: Tensor
    square: Tensor
    ring: Tensor
    low: Tensor
    run: Tensor  # high - low
    half: Tensor
    inverse: Tensor  # 1 / (squared length of the trapezoid's slanted side), 0 where that is a point
    rounding: Tensor
    bound: Tensor  # radius of a sphere around the centre that holds the solid


class Offset(NamedTuple):
    """From the nearest point of a core to a point: along q, along y; and what leads from q back to x and z."""

    q: Tensor
    y: Tensor
    u: Tensor
    v: Tensor
    ring_side: Tensor
    local_x: Tensor
    local_z: Tensor


def profile(solid: Solid) -> tuple[float, ...]:
    """`square, ring, low, high, half, rounding, bound` of one solid, with exactly its extents."""
    radius, half = solid.radius, HALF_HEIGHT[solid.shape] * solid.radius
    rounding = ROUNDING.get(solid.shape, 0.0) * radius
    flat = radius - rounding
    around = (radius**2 + half**2) ** 0.5
    match solid.shape:
        case "sphere":
            return 0.0, 0.0, 0.0, 0.0, 0.0, radius, radius
        case "ring":
            return 0.0, radius - half, 0.0, 0.0, 0.0, half, around
        case "cube":
            return flat, 0.0, 0.0, 0.0, half - rounding, rounding, (2 * radius**2 + half**2) ** 0.5
        case "cylinder":
            return 0.0, 0.0, flat, flat, half - rounding, rounding, around
        case "cone":
            return 0.0, 0.0, flat, 0.0, half - rounding, rounding, around
        case _:
            raise ValueError(f"no profile for the shape {solid.shape!r}")


def offset(point: Vector, solids: Solids) -> Offset:
    """The vector from the nearest point of each core to `point`, zero inside a core."""
    x, y, z = point[0] - solids.x, point[1] - solids.y, point[2] - solids.z
    local_x = solids.cosine * x - solids.sine * z
    local_z = solids.sine * x + solids.cosine * z
    u, v = (local_x.abs() - solids.square).clamp_min(0.0), (local_z.abs() - solids.square).clamp_min(0.0)
    ring_side = (u * u + v * v + TINY).sqrt() - solids.ring
    q = ring_side.abs()
    from_low, from_floor, rise = q - solids.low, y + solids.half, 2.0 * solids.half
    along = ((from_low * solids.run + from_floor * rise) * solids.inverse).clamp(0.0, 1.0)
    side_q, side_y = from_low - along * solids.run, from_floor - along * rise
    over = y.abs() - solids.half
    cap_q = (from_low - torch.where(y < 0, 0.0, solids.run)).clamp_min(0.0)
    capped = cap_q * cap_q + over * over < side_q * side_q + side_y * side_y
    outside = (from_low * rise - from_floor * solids.run >= 0) | (over >= 0)
    off_q = torch.where(capped, cap_q, side_q) * outside
    off_y = torch.where(capped, torch.where(y < 0, -over, over), side_y) * outside
    return Offset(off_q, off_y, u, v, ring_side, local_x, local_z)


def distance(point: Vector, solids: Solids) -> Tensor:
    """Signed distance from each point to each solid."""
    off = offset(point, solids)
    return (off.q * off.q + off.y * off.y).sqrt() - solids.rounding


def distance_and_normal(point: Vector, solids: Solids) -> tuple[Tensor, Vector]:
    """Signed distance and its gradient, a unit vector outside the core."""
    off = offset(point, solids)
    length = (off.q * off.q + off.y * off.y + TINY).sqrt()
    radial = off.q / (length * (off.ring_side + solids.ring)) * off.ring_side.sign()
    local_x, local_z = radial * off.u * off.local_x.sign(), radial * off.v * off.local_z.sign()
    x = solids.cosine * local_x + solids.sine * local_z
    z = solids.cosine * local_z - solids.sine * local_x
    return length - solids.rounding, (x, off.y / length, z)


def gather(weights: Tensor, solids: Solids) -> Solids:
    """The solid that `weights` (B, K, P), one-hot over K, picks for each ray: planes (B, 1, P)."""
    return Solids(*((weights * plane).sum(1, keepdim=True) for plane in solids))


def dot(a: Vector, b: Vector) -> Tensor:
    """Inner product, plane by plane."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def along(origin: Vector, t: Tensor, direction: Vector) -> Vector:
    """The points origin + t * direction."""
    return origin[0] + t * direction[0], origin[1] + t * direction[1], origin[2] + t * direction[2]
