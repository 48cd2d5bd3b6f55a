"""Decoding FLUX's widest layer, as cases of the kernel benchmark: name, call, bytes moved.

The 3072 -> 21504 product of the single blocks: 66 million weights, 132 MB in bf16. A call works on one of two sets of
buffers in turn, each larger than the L2 cache. The bytes are those of the stored weight, read once, and of the output.
Low-rank factors are left out of the bytes: they are what an adapter may cost beyond the decoding itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import torch

from gossamer.formats import Packed, pack
from gossamer.kernels.decode import decode, measure_row_scale
from gossamer.kernels.decode_support import READABLE, has_fp8
from gossamer.kernels.low_rank import StackedTerms, stack_terms

ROWS, COLUMNS = 21504, 3072
SLAB = 512  # rows that are packed; the rest repeats them, since some searches for scales take minutes on a whole layer
SETS = 2
RANKS = {"r16": (16,), "r64": (64,), "4xr16": (16,) * 4}
WITH_TERMS = ("bf16", "fp8", "nf4", "Q8_0", "Q4_K", "Q6_K")

Case: TypeAlias = tuple[str, Callable[[], object], int]


def layer(storage: str, device: torch.device) -> Packed:
    """A random layer of full size."""
    slab = pack(torch.randn(SLAB, COLUMNS, device=device) * 0.02, storage)
    times = ROWS // SLAB
    tensors = {
        role: tensor if role == "absmax_offset" else tensor.repeat(times, *[1] * (tensor.dim() - 1))
        for role, tensor in slab.tensors.items()
    }
    return replace(slab, tensors=tensors, shape=(ROWS, COLUMNS))


def terms(ranks: tuple[int, ...], device: torch.device) -> StackedTerms:
    """Low-rank terms in bf16 for that layer."""
    sizes = [size for rank in ranks for size in ((ROWS, rank), (rank, COLUMNS))]
    factors = [torch.randn(size, device=device, dtype=torch.bfloat16) * 0.02 for size in sizes]
    return stack_terms([(up, down, 0.8) for up, down in zip(factors[::2], factors[1::2], strict=True)])


def in_turn(calls: list[Callable[[], None]]) -> Callable[[], None]:
    """A call that works on the next set of buffers every time."""
    order = itertools.cycle(calls)
    return lambda: next(order)()


def storage_cases(storage: str, device: torch.device) -> list[Case]:
    """One format to bf16 and, where the chip has it, to fp8; the usual ones with low-rank terms as well."""
    layers = [layer(storage, device) for _ in range(SETS)]
    stacks: dict[str, StackedTerms | None] = {"": None}
    stacks |= {name: terms(ranks, device) for name, ranks in RANKS.items() if storage in WITH_TERMS}
    found = []
    for name, dtype in {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}.items():
        if name == "fp8" and not has_fp8(device):
            continue
        outs = [torch.empty(ROWS, COLUMNS, dtype=dtype, device=device) for _ in range(SETS)]
        scale = torch.ones(ROWS, device=device) if name == "fp8" else None
        moved = layers[0].nbytes + outs[0].nbytes
        for ranks, stack in stacks.items():
            calls = [partial(decode, packed, out, stack, scale) for packed, out in zip(layers, outs, strict=True)]
            found.append((f"decode {storage} -> {name} {ranks}".rstrip(), in_turn(calls), moved))
    scale = torch.empty(ROWS, device=device)
    for ranks, stack in stacks.items():
        calls = [partial(measure_row_scale, packed, scale, torch.int8, COLUMNS, stack) for packed in layers]
        found.append((f"row scale {storage} {ranks}".rstrip(), in_turn(calls), layers[0].nbytes))
    return found


def cases(device: torch.device | None = None) -> itertools.chain[Case]:
    """Every case that the chip can run, made one format at a time so that memory suffices."""
    device = device if device is not None else torch.device("cuda", torch.cuda.current_device())
    return itertools.chain.from_iterable(storage_cases(storage, device) for storage in READABLE)
