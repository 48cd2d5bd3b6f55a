"""Which canonical tensors a tensor of a FLUX.1 transformer holds, by its name in either naming.

Rows of the parts are in widths, because names alone do not tell how wide a model is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from gossamer.checkpoints.flux_names import Part, bfl_linears, bfl_norms

BLOCK = re.compile(
    r"(?P<kind>double_blocks|single_blocks|transformer_blocks|single_transformer_blocks)\.(?P<i>\d{1,3})\."
)
SINGLE = ("single_blocks", "single_transformer_blocks")


def transformer_parts(naming: str | None, bare: Iterable[str]) -> dict[str, tuple[Part, ...]]:
    """The parts of each tensor that a FLUX.1 of as many blocks as these names speak of has.

    Names of the other naming are known too, so that a file with both is told from one with unknown tensors.
    """
    bare = list(bare)
    depths = count_blocks(bare)
    bfl, canonical = _bfl_parts(*depths), _canonical_parts(*depths)
    known = {**bfl, **canonical} if naming == "diffusers" else {**canonical, **bfl}
    return {name: known[name] for name in bare if name in known}


def count_blocks(names: Iterable[str]) -> tuple[int, int]:
    """Double and single blocks that the names speak of."""
    double = single = 0
    for name in names:
        match = BLOCK.match(name)
        if match is None:
            continue
        count = int(match["i"]) + 1
        if match["kind"] in SINGLE:
            single = max(single, count)
        else:
            double = max(double, count)
    return double, single


def _bfl_parts(double: int, single: int) -> dict[str, tuple[Part, ...]]:
    linears = bfl_linears(double, single, width=1, guidance=True)
    return {
        **{
            f"{module}.{leaf}": tuple(Part(f"{part.name}.{leaf}", part.rows) for part in parts)
            for module, parts in linears.items()
            for leaf in ("weight", "bias")
        },
        **{name: (Part(norm),) for name, norm in bfl_norms(double, single).items()},
    }


def _canonical_parts(double: int, single: int) -> dict[str, tuple[Part, ...]]:
    names = [part.name for parts in _bfl_parts(double, single).values() for part in parts]
    return {name: (Part(name),) for name in names}
