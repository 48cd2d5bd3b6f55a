"""The pointwise kernels at FLUX's sizes, as cases of the kernel benchmark: name, call, bytes moved.

1024x1024, batch 1: 512 text and 4096 image tokens, width 3072. A call works on one of several sets of buffers in turn,
together larger than any L2 cache, so that bytes over time compares with a copy through device memory. The bytes are
what must be read and written once; vectors shared by all tokens are left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch

from gossamer.kernels.attention import heads_first
from gossamer.kernels.attention_codes_kernel import Turn, encode
from gossamer.kernels.attention_normed import turn_of
from gossamer.kernels.pointwise import HeadNorm, Modulation, Rotation, TextNorm
from gossamer.kernels.pointwise.backends import Pointwise, triton_functions

TEXT_TOKENS, TOKENS, WIDTH, HEAD_SIZE = 512, 4608, 3072, 128
MLP_WIDTH = 4 * WIDTH
SETS = 4
SCALE_BYTES = 4  # one float32 a row
ROTATION_BYTES = 2 * TOKENS * (HEAD_SIZE // 2) * 4  # cos and sin of every pair of channels

Case: TypeAlias = tuple[str, Callable[[], object], int]


def row_types(device: torch.device) -> dict[str, torch.dtype]:
    """Row types that the chip has, by the name they have in a case."""
    fp8 = {"fp8": torch.float8_e4m3fn} if torch.cuda.get_device_capability(device) >= (8, 9) else {}
    return {"bf16": torch.bfloat16, "int8": torch.int8} | fp8


def row_bytes(width: int, dtype: torch.dtype) -> int:
    """Bytes of all rows of one tensor."""
    return TOKENS * (width * dtype.itemsize + (SCALE_BYTES if dtype.itemsize == 1 else 0))


def in_turn(call: Callable[[torch.Tensor], object], buffers: list[torch.Tensor]) -> Callable[[], object]:
    """A call that takes the next buffer every time."""
    order = itertools.cycle(buffers)
    return lambda: call(next(order))


def random_rotation(device: torch.device) -> Rotation:
    """By angles of no meaning."""
    angles = torch.rand(TOKENS, HEAD_SIZE // 2, device=device)
    return Rotation(angles.cos(), angles.sin())


def row_cases(functions: Pointwise, name: str, dtype: torch.dtype, device: torch.device) -> list[Case]:
    """The functions that make rows of one type."""
    tokens = [torch.randn(2, 1, TOKENS, WIDTH, device=device, dtype=torch.bfloat16) for _ in range(SETS)]
    wide = [torch.randn(1, TOKENS, WIDTH + MLP_WIDTH, device=device, dtype=torch.bfloat16) for _ in range(SETS)]
    gate, scale, shift = torch.randn(3, 1, WIDTH, device=device, dtype=torch.bfloat16) * 0.1
    by = Modulation(scale, shift)
    half, narrow, joined = TOKENS * WIDTH * 2, row_bytes(WIDTH, dtype), row_bytes(WIDTH + MLP_WIDTH, dtype)
    return [
        (
            f"norm_modulate {name}",
            in_turn(lambda pair: functions.norm_modulate(pair[0], by, dtype), tokens),
            half + narrow,
        ),
        (
            f"residual_gate_norm_modulate {name}",
            in_turn(lambda pair: functions.residual_gate_norm_modulate_(pair[0], gate, pair[1], by, dtype), tokens),
            3 * half + narrow,
        ),
        (
            f"gelu_concat {name}",
            in_turn(lambda x: functions.gelu_concat(x[..., :WIDTH], x[..., WIDTH:], dtype), wide),
            5 * half + joined,
        ),
        (
            f"gelu_rows {name}",
            in_turn(lambda x: functions.gelu_rows(x[..., WIDTH:], dtype), wide),
            4 * half + row_bytes(MLP_WIDTH, dtype),
        ),
        (
            f"quantize_rows {name}",
            in_turn(lambda pair: functions.quantize_rows(pair[0], dtype), tokens),
            half + narrow,
        ),
    ]


def other_cases(functions: Pointwise, device: torch.device) -> list[Case]:
    """The functions whose output has the type of the residual."""
    half = TOKENS * WIDTH * 2
    tokens = [torch.randn(2, 1, TOKENS, WIDTH, device=device, dtype=torch.bfloat16) for _ in range(SETS)]
    single = [torch.randn(1, TOKENS, 3 * WIDTH + MLP_WIDTH, device=device, dtype=torch.bfloat16) for _ in range(2)]
    products = [torch.randint(-(2**20), 2**20, (TOKENS, WIDTH), dtype=torch.int32, device=device) for _ in range(SETS)]
    rotation = random_rotation(device)
    image, text = (HeadNorm(*torch.randn(2, HEAD_SIZE, device=device, dtype=torch.bfloat16)) for _ in range(2))
    gate = torch.randn(1, WIDTH, device=device, dtype=torch.bfloat16) * 0.1
    scales = torch.rand(TOKENS, device=device), torch.rand(WIDTH, device=device)
    rope_bytes = 4 * half + ROTATION_BYTES
    return [
        (
            "residual_gate bf16",
            in_turn(lambda pair: functions.residual_gate_(pair[0], gate, pair[1]), tokens),
            3 * half,
        ),
        (
            "qk_norm_rope single",
            in_turn(lambda x: functions.qk_norm_rope_(x[..., : 3 * WIDTH], rotation, image, None), single),
            rope_bytes,
        ),
        (
            "qk_norm_rope double",
            in_turn(
                lambda x: functions.qk_norm_rope_(x[..., : 3 * WIDTH], rotation, image, TextNorm(TEXT_TOKENS, text)),
                single,
            ),
            rope_bytes,
        ),
        (
            "rescale_product bf16",
            in_turn(lambda product: functions.rescale_product(product, *scales, gate[0], torch.bfloat16), products),
            2 * half + half,
        ),
    ]


def attention_cases(device: torch.device) -> list[Case]:
    """The codes of an attention in eight bits, from the buffer of a block, normed and rotated on the way."""
    wide = [torch.randn(1, TOKENS, 3 * WIDTH + MLP_WIDTH, device=device, dtype=torch.bfloat16) for _ in range(SETS)]
    rotation = random_rotation(device)
    image, text = (HeadNorm(*torch.randn(2, HEAD_SIZE, device=device, dtype=torch.bfloat16)) for _ in range(2))
    codes_bytes = 3 * TOKENS * WIDTH * 3 + ROTATION_BYTES

    def codes(x: torch.Tensor, turn: Turn) -> object:
        return encode(*heads_first(x[..., : 3 * WIDTH], HEAD_SIZE), turn)

    single = turn_of(rotation, image, None)
    double = turn_of(rotation, image, TextNorm(TEXT_TOKENS, text))
    return [
        ("attention codes single", in_turn(partial(codes, turn=single), wide), codes_bytes),
        ("attention codes double", in_turn(partial(codes, turn=double), wide), codes_bytes),
    ]


def cases(device: torch.device | None = None) -> list[Case]:
    """Every case that the chip can run."""
    device = device if device is not None else torch.device("cuda", torch.cuda.current_device())
    functions = triton_functions()
    found = other_cases(functions, device)
    if "fp8" in row_types(device):
        found += attention_cases(device)
    for name, dtype in row_types(device).items():
        found += row_cases(functions, name, dtype, device)
    return found
