"""Scenes of shaded solids as data, and their seeded sampling.

World: x to the right, y up, z towards the viewer; the floor is y = 0; lengths in units of about one object. Every
relation that a scene names is unambiguous in its geometry: along the named axis the distance is at least `CLEAR`, and
it is the dominant one.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

Relation = Literal["left of", "right of", "in front of", "behind", "on top of"]

SHAPES = ("sphere", "cube", "cylinder", "cone", "ring")
COLOURS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "white")
MATERIALS = ("matte", "glossy", "metal")
RADIUS = {"small": 0.36, "medium": 0.49, "large": 0.63}  # half the width of an object
BACKDROPS = ("grey", "sky", "sand", "rose", "mint", "night")
LIGHTS = ("left", "right", "front", "sunset")
RELATIONS: tuple[Relation, ...] = ("left of", "right of", "in front of", "behind", "on top of")
OPPOSITE: dict[Relation, Relation] = {
    "left of": "right of",
    "right of": "left of",
    "in front of": "behind",
    "behind": "in front of",
}
FLAT_TOPPED = ("cube", "cylinder")
STACKABLE = ("sphere", "cube", "cylinder", "cone", "ring")
HALF_HEIGHT = {"sphere": 1.0, "cube": 0.9, "cylinder": 1.0, "cone": 1.15, "ring": 0.34}  # in units of the radius

CLEAR = 0.7  # smallest distance along a relation's axis
GAP = 0.06  # smallest free floor between two objects
REACH_X, REACH_Z = 1.6, 1.05  # objects end inside this half-width; their centres stay inside this half-depth
TALLEST = 2.4  # greatest height of a stack
HELD_OUT_ONE_IN = 8


@dataclass(frozen=True)
class Solid:
    """One object and where it stands: `x`, `z` of its centre, `base` the height of its underside, `turn` in radians."""

    shape: str
    colour: str
    material: str
    size: str
    x: float
    z: float
    base: float = 0.0
    turn: float = 0.0

    @property
    def radius(self) -> float:
        """Half the width, in world units."""
        return RADIUS[self.size]

    @property
    def height(self) -> float:
        """From underside to top, in world units."""
        return 2.0 * HALF_HEIGHT[self.shape] * self.radius


@dataclass(frozen=True)
class Link:
    """A named relation: solid number `subject` is `relation` solid number `object`."""

    subject: int
    relation: Relation
    object: int


@dataclass(frozen=True)
class Scene:
    """One to three solids on a floor, the relations a caption may name, the backdrop and the light."""

    solids: tuple[Solid, ...]
    links: tuple[Link, ...]
    backdrop: str
    light: str


def relation_between(first: Solid, second: Solid) -> Relation:
    """How `first` stands to `second`: on top if it rests on it, else along the dominant floor axis."""
    dx, dz = first.x - second.x, first.z - second.z
    if first.base > second.base + 0.5 * second.height and dx * dx + dz * dz < second.radius**2:
        return "on top of"
    if abs(dx) >= abs(dz):
        return "left of" if dx < 0 else "right of"
    return "in front of" if dz > 0 else "behind"


def held_out(scene: Scene) -> bool:
    """Whether training must not see this combination.

    One in eight pairs of (colour, shape) with (colour, shape) is held out, wherever the pair occurs; for a lone object,
    one in eight of (colour, shape, material). A checksum decides, so the rule needs no list.
    """
    if len(scene.solids) == 1:
        only = scene.solids[0]
        return _chosen(f"{only.colour} {only.shape} {only.material}")
    names = sorted(f"{solid.colour} {solid.shape}" for solid in scene.solids)
    return any(_chosen(" + ".join(pair)) for pair in combinations(names, 2))


def _chosen(combination: str) -> bool:
    return zlib.crc32(combination.encode()) % HELD_OUT_ONE_IN == 0


def sample_scene(rng: random.Random, count: int | None = None) -> Scene:
    """A random scene of `count` solids (default: one, two or three) with distinct (colour, shape) pairs."""
    number = count or rng.choices((1, 2, 3), weights=(3, 4, 3))[0]
    relations = rng.choices(RELATIONS, k=number - 1)
    while relations.count("on top of") > 1:  # three solids make one stack at most
        relations = rng.choices(RELATIONS, k=number - 1)
    while True:
        scene = _place(rng, _kinds(rng, number), relations)
        if scene is not None:
            return scene


def sample_split(rng: random.Random, held: bool, count: int | None = None) -> Scene:
    """A random scene from the held-out combinations, or from all the others."""
    number = count or rng.choices((1, 2, 3), weights=(3, 4, 3))[0]
    while True:
        scene = sample_scene(rng, number)
        if held_out(scene) == held:
            return scene


@dataclass(frozen=True)
class _Kind:
    shape: str
    colour: str
    material: str
    size: str


def _kinds(rng: random.Random, number: int) -> list[_Kind]:
    looks: set[tuple[str, str]] = set()
    while len(looks) < number:
        looks.add((rng.choice(SHAPES), rng.choice(COLOURS)))
    ordered = sorted(looks)
    rng.shuffle(ordered)
    return [_Kind(shape, colour, rng.choice(MATERIALS), rng.choice(tuple(RADIUS))) for shape, colour in ordered]


def _place(rng: random.Random, kinds: list[_Kind], relations: list[Relation]) -> Scene | None:
    """Puts the solids down one after another, each related to an earlier one; None when they do not fit."""
    solids = [_put(rng, kinds[0], rng.uniform(-0.55, 0.55), rng.uniform(-0.5, 0.5))]
    links: list[Link] = []
    for index, (kind, relation) in enumerate(zip(kinds[1:], relations, strict=True), start=1):
        anchor = rng.randrange(index)
        solid = _beside(rng, kind, solids[anchor], relation)
        if solid is None or not _fits(solid, solids, anchor, relation):
            return None
        solids.append(solid)
        links.append(Link(index, relation, anchor))
    return Scene(tuple(solids), tuple(links), rng.choice(BACKDROPS), rng.choice(LIGHTS))


def _put(rng: random.Random, kind: _Kind, x: float, z: float, base: float = 0.0) -> Solid:
    turn = rng.uniform(-0.6, 0.6)
    place = round(x, 3), round(z, 3), round(base, 4), round(turn, 3)
    return Solid(kind.shape, kind.colour, kind.material, kind.size, *place)


def _beside(rng: random.Random, kind: _Kind, anchor: Solid, relation: Relation) -> Solid | None:
    if relation == "on top of":
        if anchor.shape not in FLAT_TOPPED or kind.shape not in STACKABLE or anchor.base > 0:
            return None
        top = _put(rng, kind, anchor.x, anchor.z, anchor.height)
        return top if top.radius <= anchor.radius and top.base + top.height <= TALLEST else None
    along = rng.uniform(CLEAR, 1.5)
    across = rng.uniform(-0.45, 0.45) * along
    sign = -1.0 if relation in ("left of", "behind") else 1.0
    dx, dz = (sign * along, across) if relation in ("left of", "right of") else (across, sign * along)
    return _put(rng, kind, anchor.x + dx, anchor.z + dz)


def _fits(solid: Solid, others: list[Solid], anchor: int, relation: Relation) -> bool:
    """Inside the reach, apart from the others, no other on the same seat, and not hidden from the camera."""
    if abs(solid.x) + solid.radius > REACH_X or abs(solid.z) > REACH_Z:
        return False
    for index, other in enumerate(others):
        apart = ((solid.x - other.x) ** 2 + (solid.z - other.z) ** 2) ** 0.5
        if relation == "on top of" and index == anchor:
            continue
        if apart < solid.radius + other.radius + GAP or _hides(solid, other):
            return False
    return True


def _hides(one: Solid, two: Solid) -> bool:
    """Whether the nearer of two solids covers much of the farther one, as the camera looks down at about 25 degrees."""
    near, far = (one, two) if one.z > two.z else (two, one)
    if abs(near.x - far.x) > 0.75 * (near.radius + far.radius):
        return False
    depth = near.z - far.z
    return near.base + near.height - 0.42 * depth > far.base + 0.55 * far.height
