"""Compile the pointwise kernels to machine code without a GPU: `python compile_pointwise_cases.py 75 90`.

A script, not a test, because Triton compiles only in a process that was not started with its interpreter switched on.
The kernels are launched by the package itself on FLUX's shapes, and what it asks of Triton is compiled for each chip
instead of run. Prints one JSON line a kernel.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from gossamer.kernels.pointwise import HeadNorm, Modulation, Rotation, TextNorm
from gossamer.kernels.pointwise.backends import triton_functions

WIDTH, HEADS, HEAD_SIZE = 3072, 24, 128
TOKENS = 2  # of no influence on what is compiled


@dataclass(frozen=True)
class Launch:
    """What a launch asks Triton to compile."""

    kernel: str
    output: str
    source: ASTSource
    options: dict[str, Any]


def launch_of(kernel: JITFunction, values: dict[str, Any], options: dict[str, Any], output: str) -> Launch:
    """Types, constants and alignments as Triton derives them from the arguments of a launch."""
    signature, constants, aligned = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
            continue
        signature[parameter.name] = mangle_type(value)
        divides = isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize
        if divides or isinstance(value, torch.Tensor):
            aligned[(index,)] = [["tt.divisibility", 16]]
    return Launch(kernel.fn.__name__, output, ASTSource(kernel, signature, constants, aligned), options)


def launches(run: Callable[[], object], output: str) -> list[Launch]:
    """Every launch that `run` makes, none of them carried out."""
    found = []

    def record(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        values = dict(zip(kernel.arg_names, arguments, strict=False))
        values |= {name: named.pop(name) for name in list(named) if name in kernel.arg_names}
        found.append(launch_of(kernel, values, named, output))

    original = JITFunction.run
    JITFunction.run = record
    try:
        run()
    finally:
        JITFunction.run = original
    return found


def flux_launches(residual: torch.dtype, dtype: torch.dtype) -> list[Launch]:
    """All kernels of a block with this type of residual and of rows."""
    functions, name = triton_functions(), str(dtype).removeprefix("torch.")
    x = torch.empty(1, TOKENS, WIDTH, dtype=residual)
    gate, scale, shift = torch.empty(1, 3 * WIDTH, dtype=residual).chunk(3, dim=1)
    buffer = torch.empty(1, TOKENS, 7 * WIDTH, dtype=residual)
    qkv, mlp = buffer[..., : 3 * WIDTH], buffer[..., 3 * WIDTH :]
    rotation = Rotation(torch.empty(TOKENS, HEAD_SIZE // 2), torch.empty(TOKENS, HEAD_SIZE // 2))
    norm = HeadNorm(torch.empty(HEAD_SIZE, dtype=residual), torch.empty(HEAD_SIZE, dtype=residual))
    by, product = Modulation(scale, shift), torch.empty(TOKENS, WIDTH, dtype=torch.int32)

    def block() -> None:
        functions.norm_modulate(x, by, dtype)
        functions.residual_gate_norm_modulate_(x, gate, x, by, dtype)
        functions.gelu_concat(x, mlp, dtype)
        functions.gelu_rows(mlp, dtype)
        functions.quantize_rows(x, dtype)

    def typeless() -> None:
        functions.residual_gate_(x, gate, x)
        functions.qk_norm_rope_(qkv, rotation, norm, None)
        functions.qk_norm_rope_(qkv, rotation, norm, TextNorm(1, norm))
        functions.rescale_product(product, torch.empty(TOKENS), torch.empty(WIDTH), gate[0], residual)
        functions.rescale_product(product, torch.empty(TOKENS), torch.empty(WIDTH), None, residual)

    return launches(block, name) + (launches(typeless, "none") if dtype == residual else [])


def chip_launches(chip: int) -> list[Launch]:
    """The chip's own half precision, int8 rows and, where the chip has them, fp8 rows."""
    half = torch.bfloat16 if chip >= 80 else torch.float16
    dtypes = [half, torch.int8, *([torch.float8_e4m3fn] if chip >= 89 else [])]
    return [launch for dtype in dtypes for launch in flux_launches(half, dtype)]


if __name__ == "__main__":
    for chip in map(int, sys.argv[1:]):
        for launch in chip_launches(chip):
            kernel = compile_kernel(launch.source, target=GPUTarget("cuda", chip, 32), options=launch.options)
            ptx = kernel.asm["ptx"]
            facts = {"chip": chip, "kernel": launch.kernel, "output": launch.output}
            facts |= {"binary_bytes": len(kernel.asm["cubin"]), "vector_loads": ptx.count("ld.global.v4.b32")}
            facts |= {"half_vector_loads": ptx.count("ld.global.v2.b32")}
            print(json.dumps({**facts, "nan_maxima": ptx.count("max.NaN.f32")}), flush=True)
