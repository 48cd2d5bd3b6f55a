"""The scene renderer: a batch of scenes to pictures, in plain torch, on any device, a pure function of its arguments.

Each pixel takes samples x samples rays. A ray meets the nearest solid or the floor; that point gets the key light
through a soft shadow, light from the sky through its openness, and one mirror ray. Colours are tone-mapped per ray,
then averaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

from gossamer.demo import camera, shading
from gossamer.demo.look import SceneBatch, pack_scenes
from gossamer.demo.march import FAR, LIFT, Compile, identity, openness, sunlight, trace
from gossamer.demo.solids import Solids, Vector, along, distance_and_normal, dot, gather

__all__ = ["Buffers", "SceneBatch", "pack_scenes", "render", "render_buffers"]

PRIMARY_STEPS = 28
SHADOW_STEPS = 7
MIRROR_STEPS = 14
FLOOR_MIRROR = 0.035  # reflectance of the paper's faint sheen, straight on


@dataclass(frozen=True)
class Layer:
    """The surfaces that one ray a pixel meets: (B, C, H, W), float32."""

    albedo: Tensor  # C = 3, linear; 0 where no solid is met
    normal: Tensor  # C = 3
    depth: Tensor  # C = 1, way of the ray in world units
    solid: Tensor  # C = 1, number of the solid counted from 1; 0 where none is met


@dataclass(frozen=True)
class Buffers:
    """What styles are drawn from, one ray a pixel."""

    picture: Tensor  # (B, 3, H, W), as `render` with one sample
    darkness: Tensor  # (B, 1, H, W): 0 where all light arrives, towards 1 in the dark, whatever the colour
    seen: Layer  # from the eye
    mirrored: Layer  # after one reflection; where `seen` is the floor, the scene upside down


class Hits(NamedTuple):
    """The first surface along each ray."""

    point: Vector
    normal: Vector
    t: Tensor  # (B, 1, P)
    weights: Tensor  # (B, K, P), one-hot of the solid met, all 0 on the floor


def meeting(hit: Tensor, origin: Vector, direction: Vector, solids: Solids) -> tuple[Tensor, Tensor, Vector]:
    """The nearest solid along each ray as a one-hot (B, K, P), the way to it and its normal."""
    t = hit.amin(1, keepdim=True)
    order = torch.arange(hit.shape[1], device=hit.device)[:, None]
    weights = ((order == hit.argmin(1, keepdim=True)) & (hit < FAR)).to(hit.dtype)
    _, normal = distance_and_normal(along(origin, t, direction), gather(weights, solids))
    return weights, t, normal


def nearest(hit: Tensor, origin: Vector, direction: Vector, solids: Solids) -> Hits:
    """The nearest of the solids and the floor, with the surface's normal there."""
    ground = torch.where(direction[1] < -1e-6, -origin[1] / direction[1].clamp_max(-1e-6), FAR)
    weights, t, (x, y, z) = meeting(torch.where(hit < ground, hit, FAR), origin, direction, solids)
    solid = weights.sum(1, keepdim=True)
    t = torch.minimum(t, ground)
    return Hits(along(origin, t, direction), (x * solid, y * solid + 1.0 - solid, z * solid), t, weights)


def surface(weights: Tensor, values: Tensor) -> Tensor:
    """Per-solid values (B, K, C) at each ray (B, C, P)."""
    return (weights[:, :, None] * values[..., None]).sum(1)


def mirror_ray(hits_normal: Vector, direction: Vector) -> Vector:
    """The direction that a mirror at the surface sends a ray to."""
    facing = 2.0 * dot(hits_normal, direction)
    x, y, z = (d - facing * n for d, n in zip(direction, hits_normal, strict=True))
    return x, y, z


def mirrored(hit: Tensor, origin: Vector, direction: Vector, batch: SceneBatch) -> tuple[Tensor, Tensor]:
    """What a mirror ray meets: light from a solid (B, 3, P) and how much of it is seen, fading with the way gone."""
    weights, t, normal = meeting(hit, origin, direction, batch.solids)
    ones = torch.ones_like(t)
    light = shading.diffuse(normal, batch.light_vector, 0.7 * ones, 0.8 * ones, batch.light_colour, batch.fill)
    seen = weights.sum(1, keepdim=True) * torch.exp(-0.9 * t)
    return surface(weights, batch.albedo) * light, seen


def shade(
    hits: tuple[Vector, Vector, Tensor],
    rays: tuple[Vector, Vector],
    key: Tensor,
    sky: Tensor,
    mirror_hit: Tensor,
    batch: SceneBatch,
) -> tuple[Tensor, Tensor]:
    """Linear light towards the eye (B, 3, P), and the light that a white matte surface would send (B, 1, P)."""
    (point, normal, weights), (direction, bounced) = hits, rays
    light = batch.light_vector
    solid = weights.sum(1, keepdim=True)
    paper = shading.paper(point[0], point[2], batch.floor, batch.wall)
    finish = surface(weights, batch.finish)
    base = surface(weights, batch.albedo)
    grazing = shading.schlick(-dot(normal, direction))
    matte = shading.diffuse(normal, light, key, sky, batch.light_colour, batch.fill)
    room = shading.studio(bounced, light, batch.floor, batch.wall, batch.light_colour)
    other, seen = mirrored(mirror_hit, lifted(point, normal), bounced, batch)
    image = room * (0.35 + 0.65 * sky) * (1.0 - seen) + other * seen
    coat = finish[:, 1:2] * (1.0 + 8.0 * grazing)
    velvet = finish[:, 3:4] * grazing**0.6 * sky
    body = base * matte * finish[:, :1] * (1.0 - coat) + image * (coat + base * finish[:, 2:3]) + velvet * base
    sheen = FLOOR_MIRROR * (1.0 + 4.0 * grazing) * seen
    ground = paper * matte * (1.0 - sheen) + other * sheen
    return solid * body + (1.0 - solid) * ground, matte.mean(1, keepdim=True)


def lifted(point: Vector, normal: Vector) -> Vector:
    """A point a little above its surface."""
    return along(point, torch.full_like(point[1], LIFT), normal)


@dataclass(frozen=True)
class Traced:
    """All that one bundle of rays yields, as planes of P rays."""

    found: Hits
    start: Vector
    bounced: Vector
    mirror_hit: Tensor
    light: Tensor
    matte: Tensor


def follow(direction: Vector, batch: SceneBatch, compile: Compile) -> Traced:
    """Follows the camera's rays to the light."""
    x, y, z = (torch.full((1, 1, 1), value, device=batch.light.device) for value in camera.eye())
    origin, solids = (x, y, z), batch.solids
    hit = trace(origin, direction, solids, PRIMARY_STEPS, compile)
    found: Hits = compile(nearest)(hit, origin, direction, solids)
    start = compile(lifted)(found.point, found.normal)
    key = sunlight(start, batch.light_vector, solids, SHADOW_STEPS, compile)
    sky = openness(start, found.normal, solids, compile)
    bounced = compile(mirror_ray)(found.normal, direction)
    mirror_hit = trace(start, bounced, solids, MIRROR_STEPS, compile)
    geometry = found.point, found.normal, found.weights
    light, matte = compile(shade)(geometry, (direction, bounced), key, sky, mirror_hit, batch)
    return Traced(found, start, bounced, mirror_hit, light, matte)


def render(
    batch: SceneBatch,
    size: int | tuple[int, int] = 256,
    samples: int = 2,
    compile: Compile = identity,
    chunk: int = 1,
) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1], float32, of the scenes in `batch`.

    `compile` is applied to each elementwise function (pass a cached `torch.compile`); `chunk` scenes are drawn at a
    time, each of which takes about 160 MB on a CPU at the default size.
    """
    frame = camera.frame_of(size)
    fine = camera.Frame(frame.height * samples, frame.width * samples)
    direction = camera.rays(fine, batch.light.device)
    pictures = []
    for start in range(0, len(batch), chunk):
        part = batch[start : start + chunk]
        picture = compile(shading.tone)(follow(direction, part, compile).light)
        pictures.append(functional.avg_pool2d(picture.reshape(len(part), 3, fine.height, fine.width), samples))
    return torch.cat(pictures)


def render_buffers(batch: SceneBatch, size: int | tuple[int, int] = 256, compile: Compile = identity) -> Buffers:
    """The picture and the surfaces behind it, one ray a pixel, all scenes at once."""
    frame = camera.frame_of(size)
    traced = follow(camera.rays(frame, batch.light.device), batch, compile)

    def image(planes: Tensor) -> Tensor:
        return planes.reshape(len(batch), -1, frame.height, frame.width)

    def layer(weights: Tensor, normal: Vector, t: Tensor) -> Layer:
        order = torch.arange(1, weights.shape[1] + 1, device=weights.device)[:, None]
        number = (weights * order).sum(1, keepdim=True)
        return Layer(image(surface(weights, batch.albedo)), image(torch.cat(normal, 1)), image(t), image(number))

    weights, t, normal = meeting(traced.mirror_hit, traced.start, traced.bounced, batch.solids)
    full = shading.open_floor(batch.light_vector, batch.light_colour, batch.fill)
    return Buffers(
        picture=image(shading.tone(traced.light)),
        darkness=image((1.0 - traced.matte / full).clamp(0.0, 1.0)),
        seen=layer(traced.found.weights, traced.found.normal, traced.found.t),
        mirrored=layer(weights, normal, t),
    )
