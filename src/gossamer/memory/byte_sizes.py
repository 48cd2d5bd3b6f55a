"""Sizes in bytes as people write them: GB and G are 10^9 bytes, GiB is 2^30, as the words say."""

from __future__ import annotations

import math
import re

from gossamer.errors import InvalidOptionError

UNITS = {
    **dict.fromkeys(("b", ""), 1),
    **{prefix + ending: 10**power for prefix, power in (("m", 6), ("g", 9), ("t", 12)) for ending in ("", "b")},
    **{prefix + "ib": 2**power for prefix, power in (("m", 20), ("g", 30), ("t", 40))},
}
MOST = 10**15


def parse_bytes(text: str) -> int:
    """6GB, 6GiB, 5.5G, 800MB; a number without a unit is refused, because it could be GB or bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)", text.strip().lower())
    unit = UNITS.get(match[2]) if match and match[2] else None
    size = float(match[1]) * unit if match and unit else math.nan
    if not 0 < size <= MOST:
        raise InvalidOptionError(
            f"{text!r} is not a size of memory.",
            "It takes a number above 0 and a unit: GB or G is 10^9 bytes, GiB is 2^30; MB, MiB, TB and TiB likewise.",
            "Write it like 6GB, 6GiB or 5.5G.",
        )
    return int(size)


def show_bytes(size: float) -> str:
    """In GB of 10^9 bytes, or MB below one."""
    return f"{size / 1e9:.2f} GB" if abs(size) >= 1e9 else f"{size / 1e6:.0f} MB"
