"""Rays against solids: where a ray first meets one, how much of a soft light reaches a point, how open its sky is.

Rays are planes (B, 1, P), solids (B, K, 1), so each step is one elementwise function over (B, K, P), a single kernel
where the caller compiles it. The number of steps is fixed, and no value is read back from a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gossamer.demo.solids import Solids, Vector, along, distance, distance_and_normal, dot

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]

NEAR = 3e-3  # a ray this close to a surface has met it
FAR = 1e4
LIFT = 4e-3  # secondary rays start this far off the surface
HARDNESS = 7.0  # 1 / tangent of half the angle that the key light's box spans
PROBES = (0.05, 0.13, 0.26, 0.45)  # heights above a surface at which its occlusion is probed
PROBE_WEIGHTS = (0.36, 0.27, 0.21, 0.16)


@dataclass(frozen=True)
class Pairs:
    """The (ray, solid) pairs that matter, out of all (B, K, P); planes of the pairs alone are (N,)."""

    where: Tensor

    def take(self, plane: Tensor) -> Tensor:
        """A plane's values at the pairs."""
        return plane.expand(self.where.shape)[self.where]

    def vector(self, planes: Vector) -> Vector:
        """Points or directions at the pairs."""
        return self.take(planes[0]), self.take(planes[1]), self.take(planes[2])

    def solids(self, solids: Solids) -> Solids:
        """Each pair's solid."""
        return Solids(*(self.take(plane) for plane in solids))

    def put(self, values: Tensor, rest: float) -> Tensor:
        """The pairs' values back in (B, K, P), with `rest` everywhere else."""
        whole = torch.full(self.where.shape, rest, dtype=values.dtype, device=values.device)
        whole[self.where] = values
        return whole


def sparse(mask: Tensor) -> bool:
    """Whether to work on the marked pairs alone: a CPU saves nine tenths, a GPU would wait to learn their number."""
    return mask.device.type == "cpu"


class Span(NamedTuple):
    """Where a ray enters and leaves each solid's bounding sphere; `crosses` says whether it does at all."""

    enter: Tensor
    leave: Tensor
    crosses: Tensor


def identity(function: Callable[..., Any]) -> Callable[..., Any]:
    """The `compile` of a caller who wants none."""
    return function


def span(origin: Vector, direction: Vector, solids: Solids) -> Span:
    """The stretch of each ray inside each bounding sphere."""
    to = solids.x - origin[0], solids.y - origin[1], solids.z - origin[2]
    middle = dot(to, direction)
    room = solids.bound * solids.bound - dot(to, to) + middle * middle
    reach = room.clamp_min(0.0).sqrt()
    return Span((middle - reach).clamp_min(0.0), middle + reach, (room > 0) & (middle + reach > 0))


def advance(t: Tensor, origin: Vector, direction: Vector, solids: Solids) -> Tensor:
    """One step of sphere tracing towards each solid on its own."""
    return t + distance(along(origin, t, direction), solids)


def settle(t: Tensor, ends: Span, origin: Vector, direction: Vector, solids: Solids) -> Tensor:
    """Distance to each solid that the ray has met, `FAR` for the others."""
    met = ends.crosses & (t < ends.leave) & (distance(along(origin, t, direction), solids) < NEAR)
    return torch.where(met, t, FAR)


def chase(ends: Span, origin: Vector, direction: Vector, solids: Solids, steps: int, compile: Compile) -> Tensor:
    """Distance to what each ray meets, `FAR` where it misses."""
    t, step = ends.enter, compile(advance)
    for _ in range(steps):
        t = step(t, origin, direction, solids)
    met: Tensor = compile(settle)(t, ends, origin, direction, solids)
    return met


def trace(origin: Vector, direction: Vector, solids: Solids, steps: int, compile: Compile = identity) -> Tensor:
    """Distance along each ray to each solid (B, K, P), `FAR` where it misses."""
    ends = compile(span)(origin, direction, solids)
    if not sparse(ends.crosses):
        return chase(ends, origin, direction, solids, steps, compile)
    pairs = Pairs(ends.crosses)
    few = Span(*(pairs.take(plane) for plane in ends))
    return pairs.put(
        chase(few, pairs.vector(origin), pairs.vector(direction), pairs.solids(solids), steps, compile), FAR
    )


class Bracket(NamedTuple):
    """An interval of a shadow ray that holds the point of closest approach, as an angle, to each solid."""

    low: Tensor
    high: Tensor


def halves(origin: Vector, light: Vector, solids: Solids) -> tuple[Bracket, Bracket]:
    """A shadow ray's stretch near each solid, before and behind its centre.

    Along a line the distance to a convex solid over the way gone has a single minimum; a torus has one on either side.
    """
    to = solids.x - origin[0], solids.y - origin[1], solids.z - origin[2]
    middle = dot(to, light).clamp_min(0.0) + LIFT
    before = (middle - solids.bound).clamp_min(LIFT)
    return Bracket(before, middle), Bracket(middle, middle + solids.bound)


def narrow(bracket: Bracket, origin: Vector, light: Vector, solids: Solids) -> Bracket:
    """Halves a bracket by the sign of the slope of distance / t."""
    t = 0.5 * (bracket.low + bracket.high)
    gap, normal = distance_and_normal(along(origin, t, light), solids)
    falling = t * dot(normal, light) < gap
    return Bracket(torch.where(falling, t, bracket.low), torch.where(falling, bracket.high, t))


def clearance(bracket: Bracket, origin: Vector, light: Vector, solids: Solids) -> Tensor:
    """The least distance over t in what is left of a bracket."""
    t = 0.5 * (bracket.low + bracket.high)
    return distance(along(origin, t, light), solids) / t


def approach(origin: Vector, light: Vector, solids: Solids, steps: int, compile: Compile) -> Tensor:
    """How wide of each solid a shadow ray passes, as the tangent of an angle; below 0 where it goes through."""
    first, second = compile(halves)(origin, light, solids)
    step, clear = compile(narrow), compile(clearance)
    for _ in range(steps):
        first, second = step(first, origin, light, solids), step(second, origin, light, solids)
    return torch.minimum(clear(first, origin, light, solids), clear(second, origin, light, solids))


def shadowed(origin: Vector, light: Vector, solids: Solids) -> Tensor:
    """Whether a solid's bounding sphere reaches into the cone from a point to the light's box."""
    to = solids.x - origin[0], solids.y - origin[1], solids.z - origin[2]
    middle = dot(to, light)
    aside = (dot(to, to) - middle * middle).clamp_min(0.0).sqrt() - solids.bound
    return (aside * HARDNESS < middle.clamp_min(0.0) + LIFT + solids.bound) & (middle + solids.bound > 0)


def lit(passing: Tensor) -> Tensor:
    """Share of the light's box that the solids leave visible: (B, K, P) to (B, 1, P)."""
    share = (passing * HARDNESS).clamp(0.0, 1.0).amin(1, keepdim=True)
    return share * share * (3.0 - 2.0 * share)


def sunlight(origin: Vector, light: Vector, solids: Solids, steps: int, compile: Compile = identity) -> Tensor:
    """Share of the key light that reaches each point (B, 1, P), with a penumbra that widens with distance."""
    if not sparse(solids.x):
        passing = approach(origin, light, solids, steps, compile)
    else:
        pairs = Pairs(shadowed(origin, light, solids))
        few = pairs.vector(origin), pairs.vector(light), pairs.solids(solids)
        passing = pairs.put(approach(*few, steps, compile), 1.0)
    share: Tensor = compile(lit)(passing)
    return share


def closure(point: Vector, normal: Vector, solids: Solids) -> Tensor:
    """How much of the sky over a point each solid takes away, from the free room along the point's normal."""
    closed = torch.zeros_like(solids.x * point[0])
    for weight, height in zip(PROBE_WEIGHTS, PROBES, strict=True):
        room = distance(along(point, torch.full_like(point[1], height), normal), solids)
        closed = closed + weight * (1.0 - room / height).clamp(0.0, 1.0)
    return closed


def openness(point: Vector, normal: Vector, solids: Solids, compile: Compile = identity) -> Tensor:
    """How much of the sky a point sees (B, 1, P), past the solids and the floor."""
    if not sparse(solids.x):
        closed = compile(closure)(point, normal, solids)
    else:
        to = solids.x - point[0], solids.y - point[1], solids.z - point[2]
        pairs = Pairs(dot(to, to) < (solids.bound + 2.0 * PROBES[-1]) ** 2)
        closed = pairs.put(compile(closure)(pairs.vector(point), pairs.vector(normal), pairs.solids(solids)), 0.0)
    share: Tensor = compile(visible)(closed, point, normal)
    return share


def visible(closed: Tensor, point: Vector, normal: Vector) -> Tensor:
    """The sky left by all solids (B, K, P) and by the floor: (B, 1, P)."""
    floor = torch.zeros_like(point[1])
    for weight, height in zip(PROBE_WEIGHTS, PROBES, strict=True):
        floor = floor + weight * (1.0 - (point[1] + height * normal[1]) / height).clamp(0.0, 1.0)
    return (1.0 - closed).prod(1, keepdim=True) * (1.0 - floor)
