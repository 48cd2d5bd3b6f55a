"""Graphics cards by the names that people type.

"RTX 3060 12GB"   "3060"   "rtx4090"   "NVIDIA GeForce RTX 4070 Laptop GPU"   "H100 PCIe"
"""

from __future__ import annotations

import re
from dataclasses import replace
from difflib import get_close_matches

from gossamer.errors import InvalidOptionError, UnknownOptionError
from gossamer.kernels.capability import Capability
from gossamer.memory.card import Card
from gossamer.memory.card_table import CARDS, MULTIPROCESSORS


def find_card(name: str) -> Card:
    """The card that a name means. Where several are meant (`3060`), the one sold under that name first."""
    wanted = _key(name)
    for card in CARDS:
        if wanted in map(_key, (card.name, *card.aliases)):
            return card
    known = {_key(spelling): card.name for card in CARDS for spelling in (card.name, *card.aliases)}
    nearest = [known[key] for key in get_close_matches(wanted, known, n=3)]
    raise UnknownOptionError(
        f"No card called {name!r} is known.",
        f"{len(CARDS)} cards are, such as {', '.join(dict.fromkeys(nearest or [card.name for card in CARDS[:3]]))}.",
        f"Did you mean {nearest[0]!r}? Or give the card of the table in docs/planning.md that comes nearest."
        if nearest
        else "Give the card of the table in docs/planning.md that comes nearest, and its memory with --vram.",
    )


def card_of(capability: Capability, multiprocessors: int) -> Card:
    """The card that is in a machine: by its name, else the nearest of its generation, scaled to its multiprocessors.

    The memory is the machine's own.
    """
    if capability.kind != "cuda" or capability.compute_capability is None or capability.memory_bytes is None:
        raise InvalidOptionError(
            f"{capability.name or capability.kind} cannot be planned for.",
            "Times are predicted from the data sheets of NVIDIA cards, and there is none for this device.",
            "Name a card with --gpu.",
        )
    try:
        found = find_card(capability.name)
    except UnknownOptionError:
        found = _scaled(capability, multiprocessors)
    return replace(found, memory_bytes=capability.memory_bytes, here=capability)


def _scaled(capability: Capability, multiprocessors: int) -> Card:
    generation = capability.generation
    relatives = [card for card in CARDS if card.name in MULTIPROCESSORS and card.capability.generation == generation]
    if not relatives:
        raise InvalidOptionError(
            f"{capability.name} is not in the table of cards.",
            f"Nor is another card of its generation, {generation.name}, to take its rates from.",
            "Name the card that comes nearest with --gpu, and its memory with --vram.",
        )
    nearest = min(relatives, key=lambda card: abs(MULTIPROCESSORS[card.name] - multiprocessors))
    share = multiprocessors / MULTIPROCESSORS[nearest.name]
    rates = {name: getattr(nearest, name) * share for name in ("fp16", "bf16", "fp8", "int8", "fp32")}
    return replace(nearest, name=capability.name, source=f"{nearest.name}, scaled by multiprocessors", **rates)


NOISE = re.compile(r"nvidia|geforce|tesla|quadro|graphics|card|gpu|[^a-z0-9]")


def _key(name: str) -> str:
    """The letters and digits that tell cards apart: `NVIDIA GeForce RTX 3060 12 GB` is `rtx306012g`."""
    return re.sub(r"(\d)gi?b?$", r"\1g", NOISE.sub("", name.lower()))
