"""Values of an attention in e4m3 for `attention_fp8`: transposed, in the order of Hopper's tensor cores. In torch: the
specification.

    codes      (batch * heads * 128, padded tokens) e4m3: channels down, keys across, zeros behind the last token
    exponents  (batch * heads, blocks) float32, whole numbers: codes are v / 2^exponent of the block of 128 keys

A power of two a block costs the attention nothing: P carries it in its own exponent. It is the smallest with which the
block's largest value fits, so one pass suffices where a scale for the whole head would take two, and e4m3 keeps its
three bits for values down to 1/28000 of the block's largest.

Eight-bit products want the right operand with neighbouring keys, so v has to be transposed anyway, and keys and
channels may take any order on the way:

    place 4 t + 2 h + b of every 16 holds key 8 h + 2 t + b
    row 8 g + 2 t + b of every 32 holds channel 8 t + 2 g + b
"""

from __future__ import annotations

from typing import NamedTuple

import torch

HEAD = 128  # channels of a head
BLOCK = 128  # keys with one exponent
SMALLEST, LARGEST = -60, 120  # exponents: float32 holds 2^-exponent, and sums of it


class Values(NamedTuple):
    """What `attention_fp8_kernel` multiplies P with."""

    codes: torch.Tensor
    exponents: torch.Tensor


def key_at_place(place: torch.Tensor) -> torch.Tensor:
    """The key that is stored at a place of a row."""
    return (place & ~15) | (place >> 1 & 1) << 3 | (place >> 2 & 3) << 1 | place & 1


def row_of_channel(channel: torch.Tensor) -> torch.Tensor:
    """The row in which a channel is stored."""
    return (channel & ~31) | (channel >> 1 & 3) << 3 | (channel >> 3 & 3) << 1 | channel & 1


def values_in_torch(v: torch.Tensor) -> Values:
    """The specification: v (batch, heads, tokens, 128) in any float type."""
    batch, heads, tokens, head = v.shape
    blocks = -(-tokens // BLOCK)
    padded = torch.nn.functional.pad(v.float(), (0, 0, 0, blocks * BLOCK - tokens))
    tiles = padded.reshape(batch * heads, blocks, BLOCK, head)
    largest = tiles.abs().amax((-1, -2))
    mantissa, exponent = torch.frexp(largest)  # largest is mantissa * 2^exponent, mantissa from 1/2 below 1
    exponent = torch.where(largest > 0, exponent - 9 + (mantissa > 0.875), SMALLEST).clamp(SMALLEST, LARGEST)
    scaled = torch.ldexp(tiles, -exponent[..., None, None]).to(torch.float8_e4m3fn)
    turned = scaled.view(torch.uint8).transpose(-1, -2)[..., key_at_place(torch.arange(BLOCK, device=v.device))]
    rows = torch.empty_like(turned)
    rows[:, :, row_of_channel(torch.arange(head, device=v.device))] = turned
    codes = rows.transpose(1, 2).reshape(batch * heads * head, blocks * BLOCK)
    return Values(codes.view(torch.float8_e4m3fn), exponent.float())
