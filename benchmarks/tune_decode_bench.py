"""What `tune_decode` measures with: the linears of FLUX, workers that only compile, times free of host cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from gossamer.formats import Packed, pack
from gossamer.kernels import decode as decoding
from gossamer.kernels.decode_geometry import Geometry
from gossamer.kernels.decode_reference import effective_weight, row_scales
from gossamer.kernels.low_rank import StackedTerms, powers, stack_terms
from tune_decode_variants import OUTPUTS, Case

SLAB = 64  # rows that are packed; the rest repeats them
CACHE_BYTES = 120 << 20  # what the buffers of a shape have to exceed, so that none stays in the L2 cache
LAUNCHES, RUNS = 12, 5


@dataclass(frozen=True)
class Shape:
    """Linears of FLUX.1 that are decoded as one: how often a step has them, and how many bands of rows they are."""

    rows: int
    width: int
    bands: int
    times: int


SHAPES = (
    Shape(21504, 3072, 7, 38),
    Shape(3072, 15360, 1, 38),
    Shape(9216, 3072, 3, 38),
    Shape(3072, 3072, 1, 38),
    Shape(12288, 3072, 1, 38),
    Shape(3072, 12288, 1, 38),
)
CHECKED = SHAPES[2]


def layer(storage: str, shape: Shape, device: str) -> Packed:
    """A layer whose rows repeat a few that were packed on the CPU, alike in every process."""
    generator = torch.Generator().manual_seed(0)
    slab = pack(torch.randn(SLAB, shape.width, generator=generator) * 0.02, storage)
    times = shape.rows // SLAB
    tensors = {
        role: (t if role == "absmax_offset" else t.repeat(times, *[1] * (t.dim() - 1))).to(device)
        for role, t in slab.tensors.items()
    }
    return replace(slab, tensors=tensors, shape=(shape.rows, shape.width))


def terms(rank: int, shape: Shape, device: str) -> StackedTerms | None:
    """Low-rank terms in bf16, with factors of its own for each band."""
    if not rank:
        return None
    generator = torch.Generator(device=device).manual_seed(rank)

    def factor(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device, generator=generator).bfloat16() * 0.02

    whole = stack_terms([(factor(shape.rows, rank), factor(rank, shape.width), 0.8)])
    down = factor(shape.bands * rank, shape.width)
    return StackedTerms(whole.up, down, whole.scale.repeat(shape.bands), powers(down), whole.ranks)


# compiling ------------------------------------------------------------------------------------------------------------


class _Compiling:
    """Stands in for a launch: compiles what it needs and launches nothing."""

    def __init__(self, kernel: Any, grid: Any, arguments: Any, static: dict[str, Any], device: torch.device) -> None:
        self._call = lambda: kernel.warmup(*arguments, grid=grid, **static)

    def __call__(self) -> None:
        self._call()


def start_worker() -> None:
    """Make `decode_by` compile only."""
    torch.set_num_threads(1)
    decoding.BoundLaunch = _Compiling


def compile_geometry(case: Case, geometry: Geometry) -> str:
    """Put the kernel into Triton's cache, by a call for each shape; what went wrong, or nothing."""
    try:
        for shape in (CHECKED, SHAPES[3]):  # several tiles a program, and perhaps only one
            packed = layer(case.storage, replace(shape, rows=SLAB * shape.bands), "cuda")
            stack = terms(case.rank, replace(shape, rows=SLAB * shape.bands), "cuda")
            scale = torch.empty(packed.shape[0], device="cuda") if case.output == "fp8" else None
            out = torch.empty(packed.shape, dtype=OUTPUTS[case.output], device="cuda")
            for tiles in (1, 2) if geometry.programs else (1,):
                decoding.decode_by(geometry, packed, out, stack, scale, tiles)
    except Exception as error:  # noqa: BLE001 - a geometry that does not compile is a result
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:120] if str(error) else ''}"
    return ""


# timing ---------------------------------------------------------------------------------------------------------------


class Bench:
    """The buffers of one stored format at a time."""

    def __init__(self) -> None:
        self.cover = [torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        self.storage = ""
        self.layers: dict[Shape, list[Packed]] = {}

    def take(self, storage: str) -> None:
        """Make the layers of a format, and let go of the last one's."""
        if storage == self.storage:
            return
        self.layers.clear()
        for shape in SHAPES:
            one = layer(storage, shape, "cuda")
            more = range(CACHE_BYTES // (one.nbytes + shape.rows * shape.width))
            copies = [replace(one, tensors={k: t.clone() for k, t in one.tensors.items()}) for _ in more]
            self.layers[shape] = [one, *copies]
        self.storage = storage

    def decode(self, case: Case, geometry: Geometry) -> dict[str, Any]:
        """Milliseconds of all decoding in a step, microseconds of each shape, and values that are wrong."""
        self.take(case.storage)
        each = [self._shape(case, geometry, shape) for shape in SHAPES]
        whole = sum(us * shape.times for us, shape in zip(each, SHAPES, strict=True)) / 1e3
        return {"ms": whole, "us": [round(us, 1) for us in each], "wrong": self.wrong(case, geometry)}

    def copy(self, case: Case) -> dict[str, Any]:
        """The same for copies that move as many bytes."""
        self.take(case.storage)
        each = []
        for shape in SHAPES:
            moved = self.layers[shape][0].nbytes + shape.rows * shape.width * OUTPUTS[case.output].itemsize
            sets = range(CACHE_BYTES // moved + 1)
            pairs = [torch.zeros(2, moved // 2, dtype=torch.uint8, device="cuda") for _ in sets]
            each.append(self.microseconds([lambda pair=pair: pair[0].copy_(pair[1]) for pair in pairs]))
        return {"ms": sum(us * shape.times for us, shape in zip(each, SHAPES, strict=True)) / 1e3, "us": each}

    def _shape(self, case: Case, geometry: Geometry, shape: Shape) -> float:
        stack = terms(case.rank, shape, "cuda")
        scale = torch.full((shape.rows,), 2e-4, device="cuda") if case.output == "fp8" else None
        layers, dtype = self.layers[shape], OUTPUTS[case.output]
        outs = [torch.empty(shape.rows, shape.width, dtype=dtype, device="cuda") for _ in layers]
        launches = [
            decoding.bound_decode_by(geometry, packed, out, stack, scale)
            for packed, out in zip(layers, outs, strict=True)
        ]
        return self.microseconds(launches)

    def microseconds(self, calls: list[Callable[[], object]]) -> float:
        """Of one call: the median of several rows of calls, queued while large products keep the GPU busy."""
        calls[0]()
        with self._covered():
            events = [torch.cuda.Event(enable_timing=True) for _ in range(RUNS + 1)]
            for run, event in enumerate(events):
                event.record()
                for launch in range(LAUNCHES if run < RUNS else 0):
                    calls[launch % len(calls)]()
        times = [start.elapsed_time(end) for start, end in pairwise(events)]
        return statistics.median(times) * 1e3 / LAUNCHES

    @contextmanager
    def _covered(self) -> Iterator[None]:
        torch.cuda.synchronize()
        for _ in range(3):
            torch.mm(self.cover[0], self.cover[1], out=self.cover[2])
        yield
        torch.cuda.synchronize()

    def wrong(self, case: Case, geometry: Geometry) -> int:
        """Values further from the reference than rounding explains, or not written."""
        packed, stack = self.layers[CHECKED][0], terms(case.rank, CHECKED, "cuda")
        weight = effective_weight(packed, CHECKED.width, stack)
        scale = row_scales(weight, torch.float8_e4m3fn) if case.output == "fp8" else None
        out = torch.full((CHECKED.rows, CHECKED.width), float("nan"), device="cuda").to(OUTPUTS[case.output])
        decoding.decode_by(geometry, packed, out, stack, scale)
        if scale is None:
            return int((~((out.float() - weight).abs() <= weight.abs() * 2**-8 + 1e-7)).sum())
        error = (out.float() * scale[:, None] - weight).abs()
        return int((~(error <= torch.maximum(weight.abs() / 16, scale[:, None] / 1024) + scale[:, None] / 2)).sum())
