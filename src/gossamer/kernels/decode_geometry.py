"""How the decode kernels cut a weight into tiles, warps and programs: which geometry serves which format and output.

The numbers come from `benchmarks/tune_decode.py` on an H200, on FLUX's widest layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from gossamer.kernels.decode_support import READABLE
from gossamer.kernels.low_rank import rank_step


@dataclass(frozen=True)
class Geometry:
    """Tile of a program, its warps, the tiles whose loads overlap, and the most registers of a thread.

    `programs` is about how many of them a multiprocessor gets: their tiles follow from it. None stands for one tile.
    With a `run` the kernel is `decode_gluon`'s: neighbours of a thread in a row, further bits of a column that are a
    thread's own, and lanes that have rows of their own: 8 for terms, or 4 with transposed factors.
    """

    rows: int
    cols: int
    warps: int
    stages: int = 1
    registers: int | None = None
    programs: int | None = None
    run: int = 0
    kept: int = 0
    down: int = 1


# 32 values a thread: four 16-byte stores of bf16 in flight, and runs of 512 values that are written side by side.
STORED_ONLY = Geometry(8, 512, 4)
# Before Ampere, and for float32 factors. 64 rows are what Hopper's tensor cores multiply at a time; 64 values and at
# most 128 registers a thread leave four programs on a multiprocessor: one computes while others wait for their codes.
WITH_TERMS = Geometry(64, 128, 4, registers=128, programs=8)
ROW_SCALE = Geometry(4, 512, 4)
# A program has whole rows: two of eight warps on a multiprocessor hold all rows of the widest layer at once.
ROW_SCALE_WITH_TERMS = Geometry(64, 128, 8, registers=128)


# families whose tiles with terms are faster in `decode_gluon`; the others are as fast or faster in Triton's layouts
GLUON_TERMS = ("fp8", "int8", "four_bit", "k32")


@cache
def chosen_geometry(storage: str, dtype: torch.dtype, rank: int) -> Geometry:
    """The geometry from Ampere on, for low-rank factors of 16 bits; 0 ranks stand for none. Measured by `tune_decode`.

    Two-byte outputs without terms are bound by what they write, whatever the layout. A thread writes up to 16 bytes at
    a time and reads no code twice: fields of a super-block share their bytes. From 64 ranks on, `down` takes too many
    registers of a thread to stay in them.
    """
    family, short = READABLE[storage].family, dtype.itemsize == 1
    if rank:
        return gluon_terms(storage, dtype) if rank_step(rank) < 64 and family in GLUON_TERMS else WITH_TERMS
    if short and family == "k16":
        return Geometry(8, 512, 4, run=8, kept=96, down=2)
    if short and family == "k32" and storage != "IQ4_XS":
        return Geometry(8, 512, 4, programs=32, run=8, kept=32)
    return Geometry(8, 512, 4, run=16) if short and family in ("four_bit", "legacy") else STORED_ONLY


def gluon_terms(storage: str, dtype: torch.dtype) -> Geometry:
    """The geometry of `decode_gluon` for at most 32 ranks: `down` stays in registers."""
    family = READABLE[storage].family
    run = 16 if dtype.itemsize == 1 and family in ("four_bit", "legacy") else 8
    kept = {8: 64 if family == "k16" else 32, 16: 0}[run]
    return Geometry(16, 256, 4, programs=6, run=run, kept=kept, down=8)
