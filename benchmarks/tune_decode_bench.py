"""What `tune_decode` measures with: whole layers on the GPU, workers that only compile, times free of host cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from gossamer.formats import Packed, pack
from gossamer.kernels import decode as decoding
from gossamer.kernels.decode_reference import effective_weight, round_to, row_scales
from gossamer.kernels.low_rank import StackedTerms, stack_terms
from tune_decode_variants import OUTPUTS, RANKS, Case, Variant

ROWS, COLUMNS, SLAB = 21504, 3072, 64
SETS, WARM_UPS, RUNS = 2, 2, 10
PART = 5376  # rows that are compared at a time


def layer(storage: str, rows: int, device: str) -> Packed:
    """A layer whose rows repeat a few that were packed on the CPU, alike in every process."""
    generator = torch.Generator().manual_seed(0)
    slab = pack(torch.randn(SLAB, COLUMNS, generator=generator) * 0.02, storage)
    tensors = {role: t.repeat(rows // SLAB, *[1] * (t.dim() - 1)).to(device) for role, t in slab.tensors.items()}
    return replace(slab, tensors=tensors, shape=(rows, COLUMNS))


def terms(rank: int, rows: int, device: str) -> StackedTerms | None:
    """Low-rank terms in bf16."""
    if not rank:
        return None
    generator = torch.Generator(device=device).manual_seed(rank)
    sizes = (rows, rank), (rank, COLUMNS)
    up, down = (torch.randn(size, device=device, generator=generator).bfloat16() * 0.02 for size in sizes)
    return stack_terms([(up, down, 0.8)])


# compiling ------------------------------------------------------------------------------------------------------------


class _Compiling:
    """Stands in for the kernel: compiles what a launch needs and launches nothing."""

    def __init__(self, kernel: object) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *args, **options: self.kernel.warmup(*args, grid=grid, **options)


_small: dict[object, object] = {}


def start_worker() -> None:
    """Make `decode_by` compile only."""
    torch.set_num_threads(1)
    decoding.decode_kernel = _Compiling(decoding.decode_kernel)
    decoding.gluon_decode_kernel = _Compiling(decoding.gluon_decode_kernel)
    decoding.row_scale_kernel = _Compiling(decoding.row_scale_kernel)


def compile_variant(case: Case, variant: Variant) -> str:
    """Put the kernel into Triton's cache; sizes are small, and as divisible as those of the whole layer."""
    try:
        if case.storage not in _small:
            _small[case.storage] = layer(case.storage, SLAB, "cuda")
        if case.rank not in _small:
            _small[case.rank] = terms(case.rank, SLAB, "cuda")
        packed, stack = _small[case.storage], _small[case.rank]
        scale = torch.empty(SLAB, device="cuda") if case.output in ("fp8", "scale") else None
        if case.output == "scale":
            fp8 = torch.float8_e4m3fn
            decoding.measure_row_scale_by(variant.geometry, packed, scale, fp8, COLUMNS, stack)
        else:
            out = torch.empty(SLAB, COLUMNS, dtype=OUTPUTS[case.output], device="cuda")
            decoding.decode_by(variant.geometry, packed, out, stack, scale, variant.tiles)
    except Exception as error:  # noqa: BLE001 - a variant that does not compile is a result
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:120] if str(error) else ''}"
    return ""


# timing ---------------------------------------------------------------------------------------------------------------


class Bench:
    """The buffers of whole layers, made as they are needed."""

    def __init__(self) -> None:
        self.packed: dict[str, list[Packed]] = {}
        self.outs = {
            name: [torch.empty(ROWS, COLUMNS, dtype=dtype, device="cuda") for _ in range(SETS)]
            for name, dtype in OUTPUTS.items()
        }
        self.terms = {rank: terms(rank, ROWS, "cuda") for rank in RANKS}
        self.cover = [torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        self.references: dict[tuple[str, int], torch.Tensor] = {}
        self.scales: dict[tuple[str, int], torch.Tensor] = {}
        self.bytes = torch.zeros(2, 2, ROWS * COLUMNS * 2, dtype=torch.uint8, device="cuda")

    def layers(self, storage: str) -> list[Packed]:
        """A layer in a format, once for each set of buffers."""
        if storage not in self.packed:
            one = layer(storage, ROWS, "cuda")
            copies = [replace(one, tensors={k: t.clone() for k, t in one.tensors.items()}) for _ in range(SETS - 1)]
            self.packed[storage] = [one, *copies]
        return self.packed[storage]

    def weight(self, case: Case) -> torch.Tensor:
        """The reference in float32."""
        key = case.storage, case.rank
        if key not in self.references:
            weight = effective_weight(self.layers(case.storage)[0], COLUMNS, self.terms[case.rank])
            self.references[key] = weight.clone()
        return self.references[key]

    def scale(self, case: Case) -> torch.Tensor | None:
        """The row scales that an fp8 output counts in."""
        if case.output != "fp8":
            return None
        key = case.storage, case.rank
        if key not in self.scales:
            self.scales[key] = row_scales(self.weight(case), torch.float8_e4m3fn)
        return self.scales[key]

    def times(self, calls: list[Callable[[], object]]) -> list[float]:
        """Microseconds of each counted call; the products before them end after the last one is queued."""
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(RUNS)]
        for call in calls:
            call()
        torch.cuda.synchronize()
        for _ in range(3):
            torch.mm(self.cover[0], self.cover[1], out=self.cover[2])
        covered = torch.cuda.Event()
        covered.record()
        for index in range(WARM_UPS):
            calls[index % SETS]()
        for index, (start, end) in enumerate(events):
            start.record()
            calls[index % SETS]()
            end.record()
        self.hidden = not covered.query()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e3 for start, end in events]

    def decode(self, case: Case, variant: Variant) -> dict[str, Any]:
        """Time and check one variant."""
        layers, outs, scale = self.layers(case.storage), self.outs[case.output], self.scale(case)
        stack = self.terms[case.rank]
        for out in outs:
            out.view(torch.uint8).fill_(0x7F)
        arguments = [(variant.geometry, p, o, stack, scale, variant.tiles) for p, o in zip(layers, outs, strict=True)]
        us = self.times([lambda a=a: decoding.decode_by(*a) for a in arguments])
        found = {"us": statistics.median(us), "us_min": min(us), "hidden": self.hidden, "wrong": self.wrong(case)}
        return found if case.rank else found | {"inexact": self.inexact(case)}

    def inexact(self, case: Case) -> int:
        """Values without terms that are not the reference's, bit for bit but for the sign of zero."""
        weight, scale = self.weight(case), self.scale(case)
        count = 0
        for begin in range(0, ROWS, PART):
            part = slice(begin, begin + PART)
            expected = round_to(weight[part], OUTPUTS[case.output], None if scale is None else scale[part])
            count += int((self.outs[case.output][0][part].float() != expected.float()).sum())
        return count

    def row_scale(self, case: Case, variant: Variant) -> dict[str, Any]:
        """Time and check one variant of the row scales."""
        scale, stack, fp8 = torch.full((ROWS,), float("nan"), device="cuda"), self.terms[case.rank], torch.float8_e4m3fn
        arguments = [(variant.geometry, p, scale, fp8, COLUMNS, stack) for p in self.layers(case.storage)]
        us = self.times([lambda a=a: decoding.measure_row_scale_by(*a) for a in arguments])
        expected = row_scales(self.weight(case), fp8)
        wrong = int((~((scale - expected).abs() <= 1e-5 * expected)).sum())
        return {"us": statistics.median(us), "us_min": min(us), "hidden": self.hidden, "wrong": wrong}

    def wrong(self, case: Case) -> int:
        """Values further from the reference than rounding explains."""
        weight, scale = self.weight(case), self.scale(case)
        count = 0
        for out in self.outs[case.output]:
            for begin in range(0, ROWS, PART):
                part = slice(begin, begin + PART)
                value, expected = out[part].float(), weight[part]
                if scale is None:
                    allowed = expected.abs() * 2**-8 + 1e-7
                else:
                    value = value * scale[part, None]
                    allowed = expected.abs() * (2**-4 + 2**-12) + scale[part, None] * 2**-10 * 1.001
                count += int((~((value - expected).abs() <= allowed)).sum())
        return count

    def copy(self, moved: int) -> float:
        """Microseconds of a copy that moves so many bytes."""
        pairs = [(source[: moved // 2], target[: moved // 2]) for source, target in self.bytes]
        return statistics.median(self.times([lambda s=s, t=t: t.copy_(s) for s, t in pairs]))
