"""How the decode kernels cut a weight into tiles, warps and programs: which geometry serves which format and output.

The numbers come from `benchmarks/tune_decode.py` on an H200, on all linears of a step of FLUX.1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from gossamer.kernels.decode_support import READABLE
from gossamer.kernels.low_rank import RANK_STEPS, rank_step

# lanes that have rows of their own where the product is that of the transposed factors
TURNED = 4


@dataclass(frozen=True)
class Geometry:
    """Tile of a program, its warps, the tiles whose loads overlap, and the most registers of a thread.

    `programs` is about how many of them a multiprocessor gets: their tiles follow from it. None stands for one tile.
    With a `run` the kernel is `decode_gluon`'s: neighbours of a thread in a row, further bits of a column that are a
    thread's own, lanes that have rows of their own (8 for terms, or TURNED), and tiles ahead whose codes are asked for
    (0 or 1).
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
    ahead: int = 0
    warpgroup: bool = False


# 32 values a thread: four 16-byte stores of bf16 in flight, and runs of 512 values that are written side by side.
STORED_ONLY = Geometry(8, 512, 4)
# Before Ampere, and for float32 factors. 64 rows are what Hopper's tensor cores multiply at a time; 64 values and at
# most 128 registers a thread leave four programs on a multiprocessor: one computes while others wait for their codes.
WITH_TERMS = Geometry(64, 128, 4, registers=128, programs=8)
ROW_SCALE = Geometry(4, 512, 4)
# A program has whole rows: two of eight warps on a multiprocessor hold all rows of the widest layer at once.
ROW_SCALE_WITH_TERMS = Geometry(64, 128, 8, registers=128)

FEW_RANKS = 32
# further columns of a thread, so that it reads each byte of codes once; 64 apart where bytes are not shared
_KEPT = {"k16": 96, "k32": 32, "legacy": 16}
# families whose codes are bytes that need no decoding, with one scale a row
_BYTES = ("int8", "fp8", "fp8_e5m2")
# to fp8 with up to 16 ranks, formats whose product is turned: loads touch half as many rows, and `down` is in registers
_TURNED = {
    "Q6_K": Geometry(16, 512, 4, registers=128, programs=4, run=8, kept=64, down=TURNED, ahead=1),
    "Q8_0": Geometry(16, 512, 4, programs=4, run=16, down=TURNED, ahead=1),
}
# to wider outputs without terms, formats that gain from the layouts of `decode_gluon`
_TO_FLOATS = {
    "Q3_K": Geometry(8, 1024, 4, run=8, kept=96, down=1),
    "Q6_K": Geometry(8, 512, 4, run=8, kept=96, down=2),
    "Q4_K": Geometry(8, 512, 4, run=8, kept=32, down=1),
    "Q5_K": Geometry(8, 512, 4, run=8, kept=32, down=1),
    "IQ4_NL": Geometry(8, 512, 4, run=16),
    "IQ4_XS": Geometry(8, 512, 4, run=16),
}


@cache
def chosen_geometry(storage: str, dtype: torch.dtype, rank: int, hopper: bool = False) -> Geometry:
    """The geometry from Ampere on, for low-rank factors of 16 bits; 0 ranks stand for none. Measured by `tune_decode`.

    Most two-byte outputs without terms are bound by what they write, whatever the layout. With many ranks, `down` is
    read from shared memory once for 16 rows; Hopper's warpgroups read it once for 64.
    """
    family, to_fp8 = READABLE[storage].family, dtype == torch.float8_e4m3fn
    if rank == 0:
        return _plain(storage, family, dtype)
    if family == "plain" or rank > rank_step(rank) or (family == "legacy" and not to_fp8):
        return WITH_TERMS
    if rank <= FEW_RANKS:
        return gluon_terms(storage, dtype, rank)
    return warpgroup_terms(storage) if to_fp8 and hopper else WITH_TERMS


def _plain(storage: str, family: str, dtype: torch.dtype) -> Geometry:
    """Without terms, a thread writes up to 16 bytes at a time and reads no code twice: fields share their bytes."""
    if dtype.itemsize > 1 or family == "plain":
        return _TO_FLOATS.get(storage, STORED_ONLY)
    if storage == "Q3_K":
        return Geometry(8, 1024, 4, run=16, kept=96, down=2)
    if family == "k16":
        return Geometry(8, 512, 4, run=8, kept=96, down=2)
    if storage in ("Q4_K", "Q5_K"):
        return Geometry(8, 512, 4, run=16, kept=32, down=2)
    return Geometry(8, 512, 4, run=16)


def gluon_terms(storage: str, dtype: torch.dtype, rank: int) -> Geometry:
    """The geometry of `decode_gluon` for few ranks. Lanes that look levels up have to lie side by side."""
    family = READABLE[storage].family
    if dtype == torch.float8_e4m3fn:
        return _terms_to_fp8(storage, family, rank)
    run = 16 if dtype.itemsize == 1 and family in ("four_bit", "legacy") else 8
    kept = {16: 0, 8: 64 if family == "k16" else 32}[run]
    return Geometry(16, 256, 4, programs=6, run=run, kept=kept, down=8, ahead=1)


def _terms_to_fp8(storage: str, family: str, rank: int) -> Geometry:
    """128 registers are what four programs leave a thread; where the compiler takes more, there are three of them.

    Codes of four_bit take so few that there is room for five.
    """
    run, kept = _own_columns(storage)
    low = Geometry(32, 256, 4, programs=4, run=run, kept=kept, down=8, ahead=1)
    if rank > RANK_STEPS[0]:
        return replace(low, registers=128)
    if family in _BYTES:
        return low
    return _TURNED.get(storage) or replace(low, rows=16, cols=512, programs=5 if family == "four_bit" else 4)


def _own_columns(storage: str) -> tuple[int, int]:
    """Of a thread with terms to fp8, where four lanes share a row: neighbours, and the bits of further ones."""
    family = READABLE[storage].family
    return 8 if family == "k16" else 16, 64 if storage.startswith("IQ4") else _KEPT.get(family, 64)


def warpgroup_terms(storage: str) -> Geometry:
    """The geometry of `decode_gluon` to fp8 for up to 64 ranks on Hopper: warps lie one below the other."""
    run, kept = _own_columns(storage)
    cols = 4 * run << kept.bit_count()
    return Geometry(64, cols, 4, programs=4, registers=128, run=run, kept=kept, down=8, ahead=1, warpgroup=True)
