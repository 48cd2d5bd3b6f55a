"""The geometries that `tune_decode` tries, by stored format, output and rank, the most promising first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain

import torch

from gossamer.kernels import decode_geometry
from gossamer.kernels.decode_geometry import Geometry

OUTPUTS = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
STORAGES = ("nf4", "Q4_K", "Q8_0", "Q6_K")
RANKS = (0, 16, 64)
FIRST_ROUNDS = 4  # of decoding variants before the row scales


@dataclass(frozen=True)
class Variant:
    """A geometry and the tiles of a program, one below the other; without `run` it is the Triton kernel's."""

    rows: int
    cols: int
    warps: int
    stages: int = 1
    registers: int | None = None
    tiles: int = 8
    run: int = 0
    kept: int = 0
    down: int = 1

    @property
    def geometry(self) -> Geometry:
        """What the kernels take."""
        return Geometry(
            self.rows, self.cols, self.warps, self.stages, self.registers, None, self.run, self.kept, self.down
        )

    def __str__(self) -> str:
        limit = f"r{self.registers}" if self.registers else ""
        own = f"g{self.run}.{self.kept}.{self.down}" if self.run else f"s{self.stages}"
        return f"{self.rows}x{self.cols}w{self.warps}{own}{limit}*{self.tiles}"


def of(geometry: Geometry, tiles: int) -> Variant:
    """A geometry as a variant with so many tiles a program."""
    g = geometry
    return Variant(g.rows, g.cols, g.warps, g.stages, g.registers, tiles, g.run, g.kept, g.down)


TRITON_PLAIN = Variant(8, 512, 4, tiles=1)
TRITON_TERMS = Variant(64, 128, 4, 1, 128, 8)


def plain_variants(storage: str, output: str) -> list[Variant]:
    """Without terms, the most promising first."""
    first = of(decode_geometry.chosen_geometry(storage, OUTPUTS[output], 0), 1)
    if not first.run:
        return [first, Variant(16, 512, 4, tiles=1)]
    found = [first, replace(first, rows=8), TRITON_PLAIN, replace(first, rows=8, tiles=4), replace(first, tiles=4)]
    other = {16: 8, 8: 16}[first.run]
    if storage in ("nf4", "Q8_0"):
        found.append(replace(first, run=other))
    if storage in ("Q8_0", "Q4_K"):
        found += [replace(first, run=8, kept=96, down=2), replace(first, rows=8, run=8, kept=96, down=2)]
    terms = decode_geometry.gluon_terms(storage, OUTPUTS[output])
    found += [
        of(terms, 1),
        of(terms, 4),
        of(terms, 21),
        replace(of(terms, 4), rows=8, cols=512, kept=64 if terms.run == 8 else 0, down=4),
        replace(first, rows=8, warps=2),
        replace(first, rows=32),
    ]
    return found


def term_variants(storage: str, output: str, rank: int) -> list[Variant]:
    """With terms, the most promising first. 12 columns of tiles; one round is what 132 multiprocessors hold."""
    few = rank <= 32
    first = of(decode_geometry.gluon_terms(storage, OUTPUTS[output]), 21 if few else 32)
    found = [first, replace(first, tiles=8), replace(first, tiles=11)]
    if few:
        # the transposed product: 6 columns of tiles of 8 rows
        # 5 programs a multiprocessor: 648 for 660; lanes that look levels up have to lie side by side
        kept = 64 if storage == "nf4" and first.run == 8 else first.kept
        turned = replace(first, rows=8, cols=512, kept=kept, down=4, tiles=25)
        found[1:1] = [turned, replace(turned, registers=80, tiles=21), replace(turned, rows=16, tiles=16)]
        found.append(replace(turned, tiles=10))
        found += [
            replace(first, rows=32, tiles=16),  # 4 programs a multiprocessor: 504 for 528 places
            replace(first, cols=512, warps=8),  # 384 for 396
            replace(first, cols=128, warps=2),  # 1536 for 1584
            replace(first, registers=64, tiles=16),  # 1008 for 1056
            replace(first, registers=96, tiles=26),  # 5 a multiprocessor: 624 for 660
        ]
    else:
        found += [
            replace(first, registers=None, tiles=42),  # 3 programs a multiprocessor: 384 for 396
            replace(first, registers=None, tiles=14),
            replace(first, rows=32, registers=168, tiles=21),
            replace(first, rows=32, registers=None, tiles=32),
            replace(first, cols=128, warps=2, tiles=32),
        ]
        if storage in ("nf4", "Q8_0"):  # half the columns a warp, half the registers of `down`
            found.append(replace(first, cols=128, run=8, kept=0, registers=None, tiles=16))
            found.append(replace(first, cols=128, run=8, kept=0, registers=96, tiles=26))
            found.insert(1, replace(first, run=8, kept=0, down=4))
    if storage in ("nf4", "Q8_0"):
        run, kept = (8, 32) if first.run == 16 else (16, 0)
        found.insert(3, replace(first, run=run, kept=kept))
    return [*found[:4], TRITON_TERMS, *found[4:], replace(first, tiles=4)]


@dataclass(frozen=True)
class Case:
    """A stored format, an output type ("scale" for the row scales of fp8) and a rank (0 for none)."""

    storage: str
    output: str
    rank: int

    def __str__(self) -> str:
        return f"{self.storage} -> {self.output} " + (f"r{self.rank}" if self.rank else "")


ROW_SCALES = [Variant(64, 128, 8, 1, 128, 0), Variant(64, 128, 4, 1, None, 0), Variant(16, 128, 4, 1, None, 0)]


def variants(case: Case) -> list[Variant]:
    """Every variant of a case."""
    if case.rank:
        return term_variants(case.storage, case.output, case.rank)
    return plain_variants(case.storage, case.output)


def jobs(storages: list[str]) -> list[tuple[Case, Variant]]:
    """Every case with its first variant, then with its second, and so on; row scales after the fourth."""
    cases = [Case(storage, output, rank) for rank in (16, 0, 64) for output in OUTPUTS for storage in storages]
    grids = {case: list(dict.fromkeys(variants(case))) for case in cases}
    longest = max(map(len, grids.values()))
    rounds = [[(case, grid[index]) for case, grid in grids.items() if index < len(grid)] for index in range(longest)]
    scaled = [Case(storage, "scale", rank) for storage in storages[:2] for rank in RANKS[1:]]
    scales = [(case, variant) for variant in ROW_SCALES for case in scaled]
    return list(chain(*rounds[:FIRST_ROUNDS], scales, *rounds[FIRST_ROUNDS:]))
