"""Compile decode kernels to machine code for some chips, without a GPU: `python compile_decode_cases.py 80 90`.

A script, not a test, because Triton compiles only in a process that was not started with its interpreter switched on.
Prints one JSON line a kernel: its chip and case, the bytes of its binary and of its shared memory.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from itertools import cycle

from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gossamer.kernels import decode
from gossamer.kernels.decode_kernel import decode_kernel, row_scale_kernel
from gossamer.kernels.decode_support import READABLE

WIDTH = 3072
PARTS = {"fp32": "*fp32", "fp16": "*fp16", "bf16": "*bf16", "int8": "*i8"}
OUTPUTS = {"bf16": ("*bf16", "float"), "fp16": ("*fp16", "float"), "fp32": ("*fp32", "float")}
OUTPUTS |= {"fp8": ("*fp8e4nv", "fp8"), "int8": ("*i8", "int8")}
LARGEST = {"fp8": 448.0, "int8": 127.0}


@dataclass(frozen=True)
class Case:
    """`terms` is the type of the low-rank factors, or "" without any; `kernel` is decode or row_scale."""

    storage: str
    output: str
    terms: str = ""
    kernel: str = "decode"
    even: bool = True
    ranks: int = 16
    later_ranks: bool = False


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
        Case("nf4-dq", "fp32", "fp32", ranks=64),
    ]
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


def _geometry(case: Case) -> decode.Geometry:
    if case.kernel == "decode":
        return decode.WITH_TERMS if case.terms else decode.STORED_ONLY
    return decode.ROW_SCALE_WITH_TERMS if case.terms else decode.ROW_SCALE


def source(case: Case, chip: int) -> ASTSource:
    """The kernel as `decode` would launch it on a layer of FLUX: all sizes and addresses multiples of 16."""
    fn = decode_kernel if case.kernel == "decode" else row_scale_kernel
    pointer, output = OUTPUTS[case.output]
    geometry, stored = _geometry(case), READABLE[case.storage]
    types = dict.fromkeys(("rows", "width", "stored_width", "row_bytes", "rank", "out_stride", "tiles_each"), "i32")
    types |= {} if case.terms and fn is decode_kernel else {"tiles_each": "constexpr"}
    types |= {"out": pointer} | _stored_types(case.storage, chip)
    types |= {"row_scale": "*fp32"} if output != "float" else {}
    types |= {"up": f"*{case.terms}", "down": f"*{case.terms}", "rank_scale": "*fp32"} if case.terms else {}
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
        "tiles_each": 1,
        "EVEN": case.even,
    }
    signature = {name: types.get(name, "constexpr") for name in fn.arg_names}
    constexprs = {(i,): constants.get(name) for i, name in enumerate(fn.arg_names) if signature[name] == "constexpr"}
    known = [i for i, name in enumerate(fn.arg_names) if signature[name] != "constexpr" and name != "tiles_each"]
    aligned = {(i,): [["tt.divisibility", 16]] for i in known}
    return ASTSource(fn, signature, constexprs, aligned)


def compiled(case: Case, chip: int):
    """The compiled kernel of a case."""
    geometry = _geometry(case)
    options = {"num_warps": geometry.warps, "num_stages": 1, "enable_fp_fusion": False}
    options |= {} if geometry.registers is None else {"maxnreg": geometry.registers}
    return compile_kernel(source(case, chip), target=GPUTarget("cuda", chip, 32), options=options)


if __name__ == "__main__":
    for chip in map(int, sys.argv[1:]):
        for wanted in cases(chip):
            kernel = compiled(wanted, chip)
            facts = {"binary_bytes": len(kernel.asm["cubin"]), "shared_bytes": kernel.metadata.shared}
            print(json.dumps({"chip": chip, **asdict(wanted), **facts}), flush=True)
