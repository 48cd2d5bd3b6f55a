"""Compile decode kernels to machine code for some chips, without a GPU: `python compile_decode_cases.py 80 90`.

A script, not a test, because Triton compiles only in a process that was not started with its interpreter switched on.
Prints one JSON line a kernel: its chip and case, the bytes of its binary and of its shared memory, its barriers.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from itertools import cycle

import torch
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from gossamer.kernels import decode_geometry
from gossamer.kernels.decode_gluon import gluon_decode_kernel
from gossamer.kernels.decode_kernel import decode_kernel, row_scale_kernel
from gossamer.kernels.decode_support import READABLE

WIDTH = 3072
BY_TRITON = (80, 90, 120)  # one chip of each kind of tensor core since Ampere; before it there is no other kernel
PARTS = {"fp32": "*fp32", "fp16": "*fp16", "bf16": "*bf16", "int8": "*i8"}
OUTPUTS = {"bf16": ("*bf16", "float"), "fp16": ("*fp16", "float"), "fp32": ("*fp32", "float")}
OUTPUTS |= {"fp8": ("*fp8e4nv", "fp8"), "int8": ("*i8", "int8")}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPES |= {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
UNALIGNED = ("band_rows", "tiles_each")
LARGEST = {"fp8": 448.0, "int8": 127.0}


@dataclass(frozen=True)
class Case:
    """`terms` is the type of the low-rank factors, or "" without any; `kernel` is decode or row_scale.

    `by_triton` asks for the kernel whose layouts Triton chooses, `by_gluon` for the one that states them.
    """

    storage: str
    output: str
    terms: str = ""
    kernel: str = "decode"
    even: bool = True
    ranks: int = 16
    later_ranks: bool = False
    by_triton: bool = False
    by_gluon: bool = False


def cases(chip: int) -> list[Case]:
    """Every format to the chip's own 16-bit float, the loaders to its own 8-bit type, and other variants in turns."""
    half = "bf16" if chip >= 80 else "fp16"
    byte = "fp8" if chip >= 89 else "int8"
    found = [Case(storage, half) for storage in READABLE]
    in_bytes = READABLE if chip == 90 else one_of_each_family()
    found += [Case(storage, byte, terms) for storage, terms in zip(in_bytes, cycle(("", half, "")), strict=False)]
    found += [
        Case("nf4", half, half, ranks=64),
        Case("Q4_K", byte, half, ranks=64, later_ranks=True),
        Case("Q4_K", half, half, even=False),
        *(Case(storage, byte, "", even=False) for storage in READABLE if chip == 90),
        Case("nf4-dq", "fp32", "fp32", ranks=64),
    ]
    found += [Case(storage, byte, half, ranks=64) for storage in one_of_each_family()]
    if chip in BY_TRITON:
        found += [Case(name, byte, terms, by_triton=True) for name in one_of_each_family() for terms in (half, "")]
        found += [Case(name, byte, half, by_gluon=True) for name in one_of_each_family()]
    found += [Case("nf4", byte, half, "row_scale", ranks=32), Case("Q6_K", byte, "", "row_scale", even=False)]
    return found


def one_of_each_family() -> list[str]:
    """The first format of every tile loader."""
    return list({known.family: name for name, known in reversed(READABLE.items())}.values())


def _stored_types(storage: str, chip: int) -> dict[str, str]:
    family = READABLE[storage].family
    types = {"codes": "*fp8e4nv" if storage == "fp8" and chip >= 89 else PARTS.get(storage, "*u8")}
    if family in ("fp8", "fp8_e5m2", "int8"):
        types["scale"] = "*fp32"
    if family == "four_bit":
        types |= {"scale": "*fp32", "levels": "*fp32"}
    if storage.endswith("-dq"):
        types |= {"scale": "*u8", "nested_scale": "*fp32", "nested_offset": "*fp32", "nested_levels": "*fp32"}
    if storage.startswith("IQ4"):
        types["levels"] = "*fp32"
    return types


def _geometry(case: Case, chip: int) -> decode_geometry.Geometry:
    if case.kernel != "decode":
        return decode_geometry.ROW_SCALE_WITH_TERMS if case.terms else decode_geometry.ROW_SCALE
    if chip < 80 or case.terms == "fp32" or case.by_triton:
        return decode_geometry.WITH_TERMS if case.terms else decode_geometry.STORED_ONLY
    if case.by_gluon:
        return decode_geometry.gluon_terms(case.storage, DTYPES[case.output], case.ranks)
    ranks = case.ranks * (1 + case.later_ranks) if case.terms else 0
    return decode_geometry.chosen_geometry(case.storage, DTYPES[case.output], ranks, chip == 90)


def source(case: Case, geometry: decode_geometry.Geometry, chip: int) -> ASTSource:
    """The kernel as `decode` would launch it on a layer of FLUX: all sizes and addresses multiples of 16."""
    decoding = case.kernel == "decode"
    fn = (gluon_decode_kernel if geometry.run else decode_kernel) if decoding else row_scale_kernel
    pointer, output = OUTPUTS[case.output]
    stored = READABLE[case.storage]
    types = dict.fromkeys(("rows", "width", "stored_width", "row_bytes", "rank", "out_stride", *UNALIGNED), "i32")
    types |= {} if case.terms and decoding else {"tiles_each": "constexpr"}
    types |= {"out": pointer} | _stored_types(case.storage, chip)
    types |= {"row_scale": "*fp32"} if output != "float" else {}
    types |= {"up": f"*{case.terms}", "down": f"*{case.terms}", "rank_scale": "*fp32"} if case.terms else {}
    types |= {"rank_power": "*fp32"} if case.terms and geometry.run else {}
    constants = {
        "FAMILY": stored.family,
        "FORMAT": stored.name,
        "BYTES": stored.block_bytes,
        "OUTPUT": output,
        "LARGEST": LARGEST.get(case.output),
        "RANKS": case.ranks,
        "LATER_RANKS": case.later_ranks,
        "PRECISION": "tf32x3" if chip >= 80 else "ieee",
        "ROWS": geometry.rows,
        "COLS": geometry.cols,
        "STAGES": geometry.stages,
        "RUN": geometry.run,
        "KEPT": geometry.kept,
        "DOWN": geometry.down,
        "WARPGROUP": geometry.warpgroup,
        "SPAN": geometry.ahead and geometry.cols // stored.width_multiple * stored.block_bytes,
        "tiles_each": 1,
        "EVEN": case.even,
    }
    signature = {name: types.get(name, "constexpr") for name in fn.arg_names}
    constexprs = {(i,): constants.get(name) for i, name in enumerate(fn.arg_names) if signature[name] == "constexpr"}
    known = [i for i, name in enumerate(fn.arg_names) if signature[name] != "constexpr" and name not in UNALIGNED]
    aligned = {(i,): [["tt.divisibility", 16]] for i in known}
    return (GluonASTSource if geometry.run else ASTSource)(fn, signature, constexprs, aligned)


def compiled(case: Case, chip: int, geometry: decode_geometry.Geometry | None = None):
    """The compiled kernel of a case."""
    geometry = geometry or _geometry(case, chip)
    options = {"num_warps": geometry.warps, "enable_fp_fusion": False}
    options |= {} if geometry.run else {"num_stages": 1}
    options |= {} if geometry.registers is None else {"maxnreg": geometry.registers}
    return compile_kernel(source(case, geometry, chip), target=GPUTarget("cuda", chip, 32), options=options)


def _barriers_in_loops(ptx: str) -> int:
    """Barriers between a label and the last branch back to it."""
    lines = ptx.splitlines()
    labels = {line[: line.index(":")]: place for place, line in enumerate(lines) if line.startswith("$L__BB")}
    jumps = ((place, labels.get(line.split()[-1].rstrip(";"))) for place, line in enumerate(lines) if "bra" in line)
    spans = [(start, place) for place, start in jumps if start is not None and start < place]
    return sum("bar.sync" in line and any(a < n < b for a, b in spans) for n, line in enumerate(lines))


if __name__ == "__main__":
    for chip in map(int, sys.argv[1:]):
        for wanted in cases(chip):
            kernel = compiled(wanted, chip)
            ptx = kernel.asm["ptx"]
            facts = {"binary_bytes": len(kernel.asm["cubin"]), "shared_bytes": kernel.metadata.shared}
            products = ptx.count("mma.sync") + ptx.count("wgmma.mma_async")
            facts |= {
                "barriers": _barriers_in_loops(ptx),
                "gluon": ".visible .entry gluon" in ptx,
                "products": products,
            }
            print(json.dumps({"chip": chip, **asdict(wanted), **facts}), flush=True)
