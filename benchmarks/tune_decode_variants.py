"""The geometries that `tune_decode` tries, by stored format, output and rank, the present one first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gossamer.kernels import decode_geometry
from gossamer.kernels.decode_geometry import FEW_RANKS, STORED_ONLY, TURNED, WITH_TERMS, Geometry
from gossamer.kernels.decode_support import READABLE

OUTPUTS = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
RANKS = (0, 16, 32, 64)
# neighbours of a thread and its further columns, by family: whatever lets it read each byte of codes once
RUNS = {
    "four_bit": ((16, 0),),
    "legacy": ((16, 16), (16, 0)),
    "k32": ((16, 32), (8, 32)),
    "k16": ((16, 96), (8, 96)),
    "int8": ((16, 0),),
    "fp8": ((16, 0),),
    "fp8_e5m2": ((16, 0),),
}


@dataclass(frozen=True)
class Case:
    """A stored format, an output type and a rank (0 for none)."""

    storage: str
    output: str
    rank: int

    def __str__(self) -> str:
        return f"{self.storage} -> {self.output}" + (f" r{self.rank}" if self.rank else "")


def short_name(geometry: Geometry) -> str:
    """A geometry in a word."""
    g = geometry
    own = f"g{g.run}.{g.kept}.{g.down}" if g.run else f"s{g.stages}"
    limit = f"r{g.registers}" if g.registers else ""
    programs = f"p{g.programs}" if g.programs else ""
    return f"{g.rows}x{g.cols}w{g.warps}{own}{limit}{programs}" + "a" * g.ahead + "+" * g.warpgroup


def plain_variants(storage: str) -> list[Geometry]:
    """Without terms: 32 to 128 values a thread, and how many lanes have rows of their own."""
    found = [STORED_ONLY]
    for run, kept in _runs(storage):
        lanes = 32 * run << kept.bit_count()  # columns of a warp, where all its lanes share a row
        for cols in (512, 1024):
            down = max(1, lanes // cols)
            if down <= 2 and lanes <= 4 * cols:
                found += [Geometry(rows, cols, 4, run=run, kept=kept, down=down) for rows in (8, 16)]
        found.append(replace(found[-1], rows=32))
        found.append(replace(found[-2], programs=32))
    return found


def term_variants(storage: str, rank: int, output: str) -> list[Geometry]:
    """With terms: lanes share rows as in tensor cores, or in a Hopper warpgroup for many ranks.

    Warps that lie one below the other share `down`, which every program brings at its beginning.
    """
    found = [WITH_TERMS]
    for run, kept in _term_runs(storage):
        cols = max(256, 16 * run << kept.bit_count())  # four lanes in four warps
        first = Geometry(16, cols, 4, programs=4, run=run, kept=kept, down=8, ahead=1)
        if rank <= FEW_RANKS:
            found += [first, replace(first, rows=32, warps=8, programs=2)]
            found += [replace(first, programs=5), replace(first, registers=128)]
            if cols == 512:
                low = replace(first, rows=32, cols=256)
                found += [low, replace(low, registers=128)]
        else:
            four = replace(first, rows=64, cols=cols // 4, registers=128, warpgroup=True)
            found += [four, replace(four, programs=3)]
    if rank <= FEW_RANKS:
        for run, kept in _turned_runs(storage, output):
            turned = Geometry(16, 32 * run << kept.bit_count(), 4, programs=4, run=run, kept=kept, down=TURNED, ahead=1)
            found += [turned, replace(turned, rows=32, warps=8, programs=2), replace(turned, registers=128)]
    return found


def _turned_runs(storage: str, output: str) -> Sequence[tuple[int, int]]:
    """Of eight lanes, each with two rows; none where other lanes are asked for levels."""
    family = READABLE[storage].family
    if storage.startswith("IQ4") or (family == "four_bit" and output != "fp8"):
        return ()
    if family == "k16":
        return ((8, 64),)
    return ((8, 32),) if family == "k32" else ((16, 0),)


def _runs(storage: str) -> Sequence[tuple[int, int]]:
    """Lanes that look levels up lie side by side, so that a thread of these has one run."""
    return ((16, 0),) if storage.startswith("IQ4") else RUNS[READABLE[storage].family]


def _term_runs(storage: str) -> Sequence[tuple[int, int]]:
    """Of four lanes: what lets them look levels up, and read each byte once."""
    family = READABLE[storage].family
    if family == "k16":
        return ((8, 64), (8, 96))
    if family == "legacy" and storage != "IQ4_NL":
        return ((16, 16), (16, 0))
    if family == "k32" and storage != "IQ4_XS":
        return ((16, 32), (8, 32))
    return ((16, 64), (32, 0)) if family == "four_bit" else ((16, 64), (16, 0))


def variants(case: Case) -> list[Geometry]:
    """Every geometry of a case, the present one first."""
    present = decode_geometry.chosen_geometry(case.storage, OUTPUTS[case.output], case.rank)
    others = term_variants(case.storage, case.rank, case.output) if case.rank else plain_variants(case.storage)
    return list(dict.fromkeys([present, *others]))


def jobs(cases: Sequence[Case]) -> list[tuple[Case, Geometry]]:
    """Every case with its first geometry, then with its second, and so on."""
    grids = {case: variants(case) for case in cases}
    longest = max(map(len, grids.values()))
    return [(case, grid[index]) for index in range(longest) for case, grid in grids.items() if index < len(grid)]
