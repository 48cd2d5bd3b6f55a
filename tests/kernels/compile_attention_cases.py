"""Compile attention in eight bits for Hopper, without a GPU: `python compile_attention_cases.py`.

A script, not a test, because Triton compiles only in a process that was not started with its interpreter switched on.
The arguments are made by the package itself. Prints one JSON line a kernel: what its machine code holds, in all and in
the innermost loops that multiply.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, mangle_type

from gossamer.kernels import attention_eight_bit
from gossamer.kernels.attention import heads_first
from gossamer.kernels.attention_codes import HEAD
from gossamer.kernels.attention_codes_kernel import AS_THEY_ARE, Turn, codes_kernel, empty_codes, plan_codes
from gossamer.kernels.attention_eight_bit_kernel import attention_eight_bit_kernel

HEADS, TOKENS = 24, 4608
PROCESSORS = 132  # of an H200
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compiled(kernel: JITFunction, arguments: tuple[Any, ...], source: type[ASTSource], **options: int) -> Any:
    """Types, constants and alignments as Triton derives them from the arguments of a launch."""
    signature, constants, aligned = {}, {}, {}
    for index, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=True)):
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
            continue
        signature[parameter.name] = mangle_type(value)
        divides = isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize
        if divides or isinstance(value, torch.Tensor):
            aligned[(index,)] = [["tt.divisibility", 16]]
    return compile_kernel(source(kernel, signature, constants, aligned), GPUTarget("cuda", 90, 32), options)


def attended() -> list[torch.Tensor]:
    """q, k and v of a single block of FLUX.1."""
    buffer = torch.empty(1, TOKENS, 7 * HEADS * HEAD, dtype=torch.bfloat16)
    return list(heads_first(buffer[..., : 3 * HEADS * HEAD], HEAD))


def turns() -> dict[str, Turn]:
    """What norms and rotates q and k: nothing, one weight for all tokens, or two."""
    rotation = torch.empty(TOKENS, HEAD // 2), torch.empty(TOKENS, HEAD // 2)
    weights = [torch.empty(HEAD, dtype=torch.bfloat16) for _ in range(4)]
    return {
        "codes": AS_THEY_ARE,
        "codes of a single block": Turn(*rotation, *weights[:2]),
        "codes of a double block": Turn(*rotation, *weights, text_tokens=512),
    }


def codes_of(turn: Turn) -> Any:
    """The producer of codes."""
    q, k, v = attended()
    plan = plan_codes(q, k, v, *turn)
    return compiled(codes_kernel, (q, k, v, *turn.tensors, *empty_codes(q), *plan.numbers), ASTSource, **plan.options)


def attention() -> Any:
    """Both products."""
    q, _, _ = attended()
    codes = empty_codes(q)
    boxes = attention_eight_bit.boxes_of(codes.q8, codes.k8, codes.v8)
    out = torch.empty(1, TOKENS, HEADS, HEAD, dtype=torch.bfloat16)
    scales = codes.q_scales, codes.k_scales, codes.exponents
    numbers = attention_eight_bit.tile_numbers(q.shape, PROCESSORS)
    arguments = (boxes.queries, boxes.keys, boxes.values, out, *scales, *numbers)
    return compiled(attention_eight_bit_kernel, arguments, GluonASTSource, num_warps=attention_eight_bit.WARPS)


# machine code ---------------------------------------------------------------------------------------------------------

LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)(.*?);")


def instructions(cubin: Path) -> list[tuple[int, str, str]]:
    """Address, name and operands of every instruction."""
    text = subprocess.run([TOOLS / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True).stdout
    return [(int(found[1], 16), found[2], found[3]) for found in map(LINE.match, text.splitlines()) if found]


def inner_loops(code: list[tuple[int, str, str]], wanted: str) -> list[Counter[str]]:
    """Instructions, without their suffixes, of each loop that has some `wanted` one and holds no smaller such loop."""
    places = {address: index for index, (address, _, _) in enumerate(code)}
    loops = []
    for index, (_, name, operands) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        start = places.get(int(target[1], 16)) if target else None
        if start is not None and start < index and any(code[i][1].startswith(wanted) for i in range(start, index)):
            loops.append((start, index))
    inner = [
        one for one in loops if not any(one != other and one[0] <= other[0] <= other[1] <= one[1] for other in loops)
    ]
    return [Counter(code[i][1].split(".")[0] for i in range(start, stop + 1)) for start, stop in inner]


def facts(kernel: Any) -> dict[str, Any]:
    """Of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        code = instructions(cubin)
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True)
    ptx = kernel.asm["ptx"]
    return {
        "shared_bytes": kernel.metadata.shared,
        "registers": int(re.search(r"REG:(\d+)", usage.stdout + usage.stderr)[1]),
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage.stdout + usage.stderr)[1]),
        "code": Counter(name.split(".")[0] for _, name, _ in code),
        "loops": inner_loops(code, "QGMMA"),
        "vector_loads": ptx.count("ld.global.v4.b32"),
        "vector_stores": ptx.count("st.global.v4.b32"),
        "half_vector_stores": ptx.count("st.global.v2.b32"),
    }


if __name__ == "__main__":
    kernels = {title: codes_of(turn) for title, turn in turns().items()} | {"attention": attention()}
    for title, kernel in kernels.items():
        print(json.dumps({"kernel": title, **facts(kernel)}), flush=True)
