"""Writes weights in the formats that ComfyUI describes, from the formats' definitions; nothing here uses the package.

    settings, tensors, decoded = ENCODERS["nvfp4"](weight)

`settings` is the description of the layer, `tensors` what the file holds of it by role, and `decoded` what it stands
for in float32 by the formula, written out with whole matrices. Scales and codes are not searched for: each format only
has to hold some numbers near those of the weight.

Definitions: QUANT_ALGOS of ComfyUI and the layouts of comfy-kitchen, "OCP Microscaling Formats (MX) Specification" 1.0,
"1D block scaling factors layout" in NVIDIA's cuBLAS documentation; the blockwise ones are those of convert_to_quant.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.quantizers.bfl.utils import dequantize_nvfp4, quantize_nvfp4

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

Encoded = tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor]


def scaled(weight: torch.Tensor, dtype: torch.dtype, name: str, by_row: bool = False, **settings: Any) -> Encoded:
    """Codes of eight bits, and one scale or one a row."""
    largest = weight.abs().amax(dim=1, keepdim=True) if by_row else weight.abs().max()
    scale = largest / (127 if dtype == torch.int8 else torch.finfo(dtype).max)
    codes = rounded(weight / scale, dtype)
    tensors = {"weight": codes, "weight_scale": scale}
    return {"format": name, **settings}, tensors, codes.float() * scale


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """To the nearest code."""
    return values.round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else values.to(dtype)


def blockwise(weight: torch.Tensor, dtype: torch.dtype, name: str, group: int) -> Encoded:
    """A scale for every square of `group` rows and columns."""
    rows, width = weight.shape
    squares = weight.view(rows // group, group, width // group, group)
    scale = squares.abs().amax(dim=(1, 3)) / (127 if dtype == torch.int8 else 448)
    spread = scale.repeat_interleave(group, dim=0).repeat_interleave(group, dim=1)
    codes = rounded(weight / spread, dtype)
    return {"format": name, "group_size": group}, {"weight": codes, "weight_scale": scale}, codes.float() * spread


# rotated --------------------------------------------------------------------------------------------------------------


def rotation(size: int) -> torch.Tensor:
    """The regular Hadamard matrix of ConvRot: symmetric, and its own inverse."""
    once = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.kron(matrix, once)
    return matrix


def rotated(weight: torch.Tensor, size: int) -> torch.Tensor:
    """Groups of `size` in each row times the matrix. Integers stay exact: sums of them times a power of two."""
    return (weight.view(weight.shape[0], -1, size) @ rotation(size)).view(weight.shape)


def rotated_int8(weight: torch.Tensor, size: int) -> Encoded:
    """Integers by row, of a rotated weight."""
    turned = rotated(weight, size)
    scale = turned.abs().amax(dim=1, keepdim=True) / 127
    codes = rounded(turned / scale, torch.int8)
    settings = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": size, "per_row": True}
    return settings, {"weight": codes, "weight_scale": scale}, rotated(codes.float(), size) * scale


def rotated_w4a4(weight: torch.Tensor, size: int) -> Encoded:
    """Integers from -7 to 7 by row, of a rotated weight."""
    turned = rotated(weight, size)
    scale = turned.abs().amax(dim=1) / 7
    codes = (turned / scale[:, None]).round().clamp(-7, 7)
    tensors = {"weight": low_first(codes.to(torch.int8)).view(torch.int8), "weight_scale": scale}
    settings = {"format": "convrot_w4a4", "convrot_groupsize": size}
    return settings, tensors, rotated(codes, size) * scale[:, None]


def rotated_w4a8(weight: torch.Tensor, size: int, group: int = 16) -> Encoded:
    """Codes from 0 to 15 that stand for integers of eight bits by a code book and a scale a group."""
    turned = rotated(weight, size)
    channel = turned.abs().amax(dim=1) / 127
    book = torch.tensor([-8.0, -6.2, -4.9, -3.9, -3, -2.2, -1.4, -0.7, 0, 0.7, 1.4, 2.2, 3, 3.9, 4.9, 8])
    groups = (turned / channel[:, None]).view(len(weight), -1, group)
    relative = (groups.abs().amax(dim=2) / 8).to(E4M3)
    codes = (groups / relative.float()[:, :, None]).unsqueeze(-1).sub(book).abs().argmin(dim=-1)
    integers = (book[codes] * relative.float()[:, :, None]).round().clamp(-127, 127).view(weight.shape)
    tensors = {
        "weight": low_first(codes.view(weight.shape)).view(torch.int8),
        "weight_s_rel": relative,
        "weight_s_channel": channel,
        "weight_codebook": book,
    }
    settings = {"format": "asym_w4a8_int8", "convrot_groupsize": size, "group_size": group}
    return settings, tensors, rotated(integers, size) * channel[:, None]


def low_first(codes: torch.Tensor) -> torch.Tensor:
    """Two codes a byte, the earlier in the low four bits."""
    low, high = (codes[:, place::2].to(torch.uint8) & 15 for place in (0, 1))
    return low | (high << 4)


# blocks ---------------------------------------------------------------------------------------------------------------


def nvfp4(weight: torch.Tensor) -> Encoded:
    """As diffusers rounds it, in the order of comfy-kitchen: the earlier value in the high bits, scales in tiles."""
    codes, scale, scale_2 = quantize_nvfp4(weight)
    tensors = {"weight": (codes << 4) | (codes >> 4), "weight_scale": in_tiles(scale), "weight_scale_2": scale_2}
    return {"format": "nvfp4"}, tensors, dequantize_nvfp4(codes, scale, scale_2)


def mxfp8(weight: torch.Tensor) -> Encoded:
    """Blocks of 32 with a power of two each."""
    blocks = weight.view(len(weight), -1, 32)
    exponents = (blocks.abs().amax(dim=2) / 448).log2().ceil().clamp(-127, 127)
    scale = torch.pow(2.0, exponents)[:, :, None]
    codes = (blocks / scale).to(E4M3)
    tensors = {"weight": codes.view(weight.shape), "weight_scale": in_tiles((exponents + 127).to(torch.uint8))}
    return {"format": "mxfp8"}, tensors, (codes.float() * scale).view(weight.shape)


def in_tiles(scales: torch.Tensor) -> torch.Tensor:
    """Scales (rows, columns) padded to whole tiles of 128 x 4; row 32 j + i, column k of one is byte 16 i + 4 j + k."""
    rows, columns = scales.shape
    padded = torch.zeros(-(-rows // 128) * 128, -(-columns // 4) * 4, dtype=torch.uint8)
    padded[:rows, :columns] = scales.view(torch.uint8)
    tiles = padded.view(padded.shape[0] // 128, 4, 32, padded.shape[1] // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(padded.shape).view(scales.dtype)


def awq(weight: torch.Tensor, group: int = 64) -> Encoded:
    """Codes from 0 to 15 with a step and a middle for each group of a row."""
    groups = weight.view(len(weight), -1, group)
    least, most = groups.amin(dim=2), groups.amax(dim=2)
    scale = (most - least) / 15
    zero = least + 8 * scale
    codes = ((groups - least[:, :, None]) / scale[:, :, None]).round().clamp(0, 15)
    decoded = (codes - 8) * scale[:, :, None] + zero[:, :, None]
    tensors = {
        "weight": low_first(codes.view(weight.shape)).view(torch.int8),
        "weight_scale": scale.t(),
        "weight_zeros": zero.t(),
    }
    return {"format": "awq_w4a16"}, tensors, decoded.view(weight.shape)


ENCODERS: dict[str, Callable[[torch.Tensor], Encoded]] = {
    "fp8": partial(scaled, dtype=E4M3, name="float8_e4m3fn"),
    "fp8 e5m2": partial(scaled, dtype=E5M2, name="float8_e5m2"),
    "fp8 by row": partial(scaled, dtype=E4M3, name="float8_e4m3fn_rowwise", by_row=True),
    "fp8 by square": partial(blockwise, dtype=E4M3, name="float8_e4m3fn_blockwise", group=64),
    "int8": partial(scaled, dtype=torch.int8, name="int8_tensorwise"),
    "int8 by row": partial(scaled, dtype=torch.int8, name="int8_tensorwise", by_row=True, per_row=True),
    "int8 by square": partial(blockwise, dtype=torch.int8, name="int8_blockwise", group=128),
    "int8 rotated": partial(rotated_int8, size=256),
    "int8 rotated by 64": partial(rotated_int8, size=64),
    "w4a4 rotated": partial(rotated_w4a4, size=256),
    "w4a8 rotated": partial(rotated_w4a8, size=256),
    "nvfp4": nvfp4,
    "mxfp8": mxfp8,
    "awq": awq,
}
