"""Grading a picture against the scene its prompt asked for.

A caption names the colour and the shape of every solid and every link, so that is what a picture owes. An object is
right when one of that shape and colour is seen, each seen object counted once. A relation is right when both its
objects are right and stand to each other as asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import TypedDict

from gossamer.demo.reader import Reading
from gossamer.demo.scene import Link, Scene

Kind = tuple[str, str]  # shape, colour


@dataclass(frozen=True)
class Grade:
    """How much of a scene a picture shows; `extra` counts seen objects that nobody asked for."""

    objects_right: int
    objects: int
    relations_right: int
    relations: int
    extra: int

    @property
    def exact(self) -> bool:
        """Whether the picture shows the whole scene and no other object."""
        return (self.objects_right, self.relations_right, self.extra) == (self.objects, self.relations, 0)


def grade(scene: Scene, reading: Reading) -> Grade:
    """How much of `scene` the picture behind `reading` shows."""
    wanted = [(solid.shape, solid.colour) for solid in scene.solids]
    found = [(seen.shape, seen.colour) for seen in reading.objects]
    right = (Counter(wanted) & Counter(found)).total()
    return Grade(
        objects_right=right,
        objects=len(wanted),
        relations_right=max(_links_right(scene.links, match, reading) for match in _matchings(wanted, found)),
        relations=len(scene.links),
        extra=len(found) - right,
    )


def _links_right(links: Iterable[Link], match: dict[int, int], reading: Reading) -> int:
    """Links that hold when wanted object i is seen object `match[i]`."""
    return sum(
        link.subject in match
        and link.object in match
        and reading.relation(match[link.subject], match[link.object]) == link.relation
        for link in links
    )


def _matchings(wanted: Sequence[Kind], found: Sequence[Kind]) -> Iterator[dict[int, int]]:
    """Every way to give as many wanted objects as possible a seen one of their kind; twins make more than one."""
    groups = [_pairings(_places(kind, wanted), _places(kind, found)) for kind in dict.fromkeys(wanted)]
    for choice in product(*groups):
        yield {one: other for pairs in choice for one, other in pairs}


def _places(kind: Kind, kinds: Sequence[Kind]) -> list[int]:
    return [index for index, other in enumerate(kinds) if other == kind]


def _pairings(ones: list[int], others: list[int]) -> list[list[tuple[int, int]]]:
    """Every way to pair off two lists as far as the shorter one reaches."""
    if len(ones) <= len(others):
        return [list(zip(ones, chosen, strict=True)) for chosen in permutations(others, len(ones))]
    return [list(zip(chosen, others, strict=True)) for chosen in permutations(ones, len(others))]


class Shares(TypedDict):
    """Shares in per cent over some pictures, None where there was nothing to get right; `extra` counts objects."""

    pictures: int
    objects: float | None
    relations: float | None
    exact: float | None
    extra: int


class Summary(Shares):
    """Shares over all pictures, and over those whose scene has one, two or three objects."""

    by_count: dict[int, Shares]


def summarize(grades: Sequence[Grade]) -> Summary:
    """The grades of many pictures in one record, ready for JSON."""
    counts = sorted({one.objects for one in grades})
    rows = {count: _shares([one for one in grades if one.objects == count]) for count in counts}
    return Summary(**_shares(grades), by_count=rows)


def _shares(grades: Sequence[Grade]) -> Shares:
    return Shares(
        pictures=len(grades),
        objects=_percent(sum(one.objects_right for one in grades), sum(one.objects for one in grades)),
        relations=_percent(sum(one.relations_right for one in grades), sum(one.relations for one in grades)),
        exact=_percent(sum(one.exact for one in grades), len(grades)),
        extra=sum(one.extra for one in grades),
    )


def _percent(part: int, whole: int) -> float | None:
    return None if whole == 0 else 100.0 * part / whole
