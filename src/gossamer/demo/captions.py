"""Captions of scenes in varied natural wording.

A caption always names the colour and the shape of every solid, and every link of the scene. Size, material, backdrop
and light are named only sometimes, so the model must choose them itself when a prompt leaves them open.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from gossamer.demo.scene import OPPOSITE, Link, Relation, Scene, Solid

SHAPE_WORDS = {
    "sphere": ("sphere", "sphere", "ball", "ball", "orb", "globe"),
    "cube": ("cube", "cube", "cube", "box", "block"),
    "cylinder": ("cylinder", "cylinder", "cylinder", "drum", "tube"),
    "cone": ("cone",),
    "ring": ("ring", "ring", "ring", "torus", "donut", "hoop"),
}
COLOUR_WORDS = {
    "red": ("red", "red", "red", "crimson", "scarlet"),
    "orange": ("orange", "orange", "orange", "tangerine"),
    "yellow": ("yellow", "yellow", "yellow", "lemon yellow", "sunny yellow"),
    "green": ("green", "green", "green", "emerald", "grass green"),
    "teal": ("teal", "teal", "turquoise", "cyan"),
    "blue": ("blue", "blue", "blue", "cobalt", "royal blue"),
    "purple": ("purple", "purple", "violet"),
    "white": ("white", "white", "white", "ivory", "snow white"),
}
MATERIAL_WORDS = {
    "matte": ("matte", "dull", "chalky", "clay"),
    "glossy": ("glossy", "shiny", "plastic", "lacquered"),
    "metal": ("metal", "metallic", "polished metal", "chrome"),
}
MATERIAL_TAILS = {
    "matte": ("with a matte finish", "made of clay"),
    "glossy": ("with a glossy finish", "made of shiny plastic"),
    "metal": ("made of metal", "made of polished metal"),
}
SIZE_WORDS = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium-sized", "mid-sized"),
    "large": ("large", "big", "huge"),
}
RELATION_WORDS: dict[Relation, tuple[str, ...]] = {
    "left of": ("left of", "to the left of", "on the left of", "on the left side of"),
    "right of": ("right of", "to the right of", "on the right of", "on the right side of"),
    "in front of": ("in front of", "in front of", "closer than", "nearer to us than"),
    "behind": ("behind", "behind", "in back of", "farther away than"),
    "on top of": ("on top of", "on", "resting on", "sitting on top of", "standing on", "stacked on"),
}
BESIDE_IT: dict[Relation, tuple[str, ...]] = {
    "left of": ("to its left", "on its left"),
    "right of": ("to its right", "on its right"),
    "in front of": ("in front of it",),
    "behind": ("behind it",),
    "on top of": ("on top", "on top of it", "resting on it"),
}
BACKDROP_WORDS = {
    "grey": ("on a grey floor", "against a plain grey backdrop", "with a light grey background", "in a grey studio"),
    "sky": ("against a pale blue backdrop", "with a sky blue background", "on a light blue floor"),
    "sand": ("on a sand-coloured floor", "against a beige backdrop", "with a warm beige background"),
    "rose": ("against a pink backdrop", "with a rose background", "on a soft pink floor"),
    "mint": ("against a mint backdrop", "with a mint green background", "on a pale mint floor"),
    "night": ("in a dark room", "on a dark background", "at night", "against a dark backdrop"),
}
LIGHT_WORDS = {
    "left": ("lit from the left", "with light from the left"),
    "right": ("lit from the right", "with light from the right"),
    "front": ("in soft frontal light", "lit from the front"),
    "sunset": ("in warm sunset light", "at golden hour", "in evening light"),
}
OPENINGS = (
    "a picture of ",
    "a photo of ",
    "a render of ",
    "a 3D render of ",
    "an image of ",
    "a studio shot of ",
    "a still life with ",
)


@dataclass(frozen=True)
class Caption:
    """A text and the scene it describes."""

    text: str
    scene: Scene


def caption(scene: Scene, rng: random.Random) -> Caption:
    """A caption of `scene`; the same generator state gives the same words."""
    names = [_Name(solid, rng) for solid in scene.solids]
    body = _one(names[0], rng) if not scene.links else _related(names, scene.links, rng)
    surroundings = _surroundings(scene, rng)
    text = f"{body}{surroundings}"
    if " is " not in body and rng.random() < 0.45:
        text = rng.choice(OPENINGS) + text
    return Caption(_finish(text, rng), scene)


class _Name:
    """How one solid is called: indefinite at first mention, definite after it."""

    def __init__(self, solid: Solid, rng: random.Random) -> None:
        self.shape = rng.choice(SHAPE_WORDS[solid.shape])
        self.colour = rng.choice(COLOUR_WORDS[solid.colour])
        words = [self.colour, self.shape]
        tail = ""
        if rng.random() < 0.6:
            if rng.random() < 0.8:
                words.insert(0, rng.choice(MATERIAL_WORDS[solid.material]))
            else:
                tail = " " + rng.choice(MATERIAL_TAILS[solid.material])
        if rng.random() < (0.2 if solid.size == "medium" else 0.5):
            words.insert(0, rng.choice(SIZE_WORDS[solid.size]))
        self.first = f"{_article(words[0])} {' '.join(words)}{tail}"
        self.again = f"the {self.colour} {self.shape}" if rng.random() < 0.7 else f"the {self.shape}"
        self.again_full = f"the {self.colour} {self.shape}"


def _one(name: _Name, rng: random.Random) -> str:
    return rng.choice(("{0}", "{0}", "{0}", "a single object: {0}", "just {0}", "{0} alone")).format(name.first)


def _related(names: list[_Name], links: tuple[Link, ...], rng: random.Random) -> str:
    parts = [_first_link(names, links[0], rng)]
    parts += [_next_link(names, link, rng) for link in links[1:]]
    joint = rng.choice((", and ", "; ", ", with ")) if len(parts) > 1 else ""
    if joint == ", with " and " is " in parts[-1]:
        joint = ", and "
    return joint.join(parts)


def _first_link(names: list[_Name], link: Link, rng: random.Random) -> str:
    one, relation, two = names[link.subject], link.relation, names[link.object]
    style = rng.random()
    if style < 0.25 and relation in OPPOSITE:
        one, relation, two = two, OPPOSITE[relation], one
    if style > 0.75:
        return f"{two.first} with {one.first} {rng.choice(BESIDE_IT[relation])}"
    if relation == "on top of" and style < 0.15:
        return f"{two.first} {rng.choice(('under', 'below', 'beneath', 'supporting'))} {one.first}"
    return f"{one.first} {rng.choice(('', '', 'is '))}{rng.choice(RELATION_WORDS[relation])} {two.first}"


def _next_link(names: list[_Name], link: Link, rng: random.Random) -> str:
    one, two = names[link.subject], names[link.object]
    unique = sum(name.shape == two.shape for name in names) == 1
    known = two.again if unique else two.again_full
    return f"{one.first} {rng.choice(('', '', 'is '))}{rng.choice(RELATION_WORDS[link.relation])} {known}"


def _surroundings(scene: Scene, rng: random.Random) -> str:
    phrases = []
    if rng.random() < 0.5:
        phrases.append(rng.choice(BACKDROP_WORDS[scene.backdrop]))
    if rng.random() < 0.35:
        phrases.append(rng.choice(LIGHT_WORDS[scene.light]))
    return "".join(f", {phrase}" for phrase in phrases)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _finish(text: str, rng: random.Random) -> str:
    style = rng.random()
    if style < 0.04:
        return text.upper() if style < 0.015 else text.title()
    if style < 0.38:
        return text[0].upper() + text[1:] + "."
    return text[0].upper() + text[1:] if style < 0.5 else text
