"""How a backend is picked from a list: the first without an obstacle, and every other with the reason against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gossamer.errors import InvalidOptionError


@dataclass(frozen=True)
class Option:
    """Something that could be chosen: what speaks for it, and what forbids it, if anything does."""

    name: str
    merit: str
    obstacle: str | None = None


@dataclass(frozen=True)
class Reason:
    """Why one part of a choice is, or is not, as named."""

    part: str
    option: str
    text: str


@dataclass(frozen=True)
class Picked:
    """The name that was picked, its reason, and one reason against each other."""

    name: str
    reason: Reason
    rejected: tuple[Reason, ...]


def pick(part: str, options: Sequence[Option]) -> Picked:
    """The first option that nothing forbids; where everything is forbidden, an error with all the obstacles."""
    chosen = next((option for option in options if option.obstacle is None), None)
    if chosen is None:
        raise InvalidOptionError(
            f"There is no {part} backend for this.",
            "; ".join(f"{option.name}: {option.obstacle}" for option in options) + ".",
            "Choose another storage format or compute type.",
        )
    rejected = tuple(
        Reason(part, option.name, option.obstacle or f"usable, but {chosen.name} comes first")
        for option in options
        if option is not chosen
    )
    return Picked(chosen.name, Reason(part, chosen.name, chosen.merit), rejected)
