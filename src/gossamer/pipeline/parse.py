"""Readers of the texts that options are given as; each one says what it expected."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from gossamer.errors import InvalidOptionError

CONTROL_KINDS = ("auto", "map", "picture")
FORMATS = ("text", "json")
SIZE_MULTIPLE = 16  # the autoencoder shrinks 8 times, the transformer sees 2 x 2 patches
LARGEST_SIZE = 8192
MOST_SEEDS = 10_000


@dataclass(frozen=True)
class Size:
    """Width and height of a picture, in pixels."""

    width: int
    height: int

    def __post_init__(self) -> None:
        for side in (self.width, self.height):
            if not isinstance(side, int) or side % SIZE_MULTIPLE or not 0 < side <= LARGEST_SIZE:
                raise InvalidOptionError(
                    f"A picture cannot be {self.width}x{self.height}.",
                    f"Width and height must be divisible by {SIZE_MULTIPLE}, from {SIZE_MULTIPLE} to {LARGEST_SIZE}: "
                    "the autoencoder shrinks 8 times and the transformer sees patches of 2 x 2.",
                    f"The nearest size is {_nearest(self.width)}x{_nearest(self.height)}.",
                )

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def _nearest(side: int) -> int:
    return min(max(SIZE_MULTIPLE, round(side / SIZE_MULTIPLE) * SIZE_MULTIPLE), LARGEST_SIZE)


def parse_size(text: str) -> Size:
    """WxH."""
    match = re.fullmatch(r"(-?\d{1,9})[xX](-?\d{1,9})", text.strip())
    if match is None:
        raise InvalidOptionError(
            f"{text!r} is not a size.", "A size is width x height in pixels.", "Write it like 256x256."
        )
    return Size(int(match[1]), int(match[2]))


def parse_integer(text: str) -> int:
    """A whole number."""
    if not re.fullmatch(r"[+-]?\d{1,18}", text.strip()):
        raise InvalidOptionError(
            f"{text!r} is not a whole number.", "This option counts something.", "Write it like 20."
        )
    return int(text)


def parse_number(text: str) -> float:
    """A number."""
    try:
        return float(text)
    except ValueError as error:
        raise InvalidOptionError(
            f"{text!r} is not a number.", "This option is a strength.", "Write it like 3.5."
        ) from error


def parse_seeds(text: str) -> tuple[int, ...]:
    """One seed, a comma list, a range with both ends, or a mixture: 7, 1,5,9, 0-3, 0-3,8."""
    ranges = [_seed_range(part.strip(), text) for part in text.split(",")]
    if sum(map(len, ranges)) > MOST_SEEDS:
        raise InvalidOptionError(
            f"{text!r} asks for more than {MOST_SEEDS} seeds.",
            "Each seed is one picture.",
            "Give a smaller range, and further ranges in later runs.",
        )
    return tuple(seed for seeds in ranges for seed in seeds)


def _seed_range(part: str, text: str) -> range:
    match = re.fullmatch(r"(\d{1,19})(?:-(\d{1,19}))?", part)
    seeds = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
    if not seeds or seeds.stop > 2**63:
        raise InvalidOptionError(
            f"{text!r} is not a seed, a list of seeds or a range of seeds.",
            "Seeds are whole numbers from 0 to 2^63 - 1, and a range runs upwards.",
            "Write it like 7, 1,5,9 or 0-3.",
        )
    return seeds


def parse_choice(choices: tuple[str, ...]) -> Callable[[str], str]:
    """A reader that takes one of the given words."""

    def parse(text: str) -> str:
        if text not in choices:
            raise InvalidOptionError(
                f"{text!r} is not one of the choices.",
                f"The choices are: {', '.join(choices)}.",
                f"Try {choices[0]!r}.",
            )
        return text

    return parse
