"""Operands of an attention in eight bits (`attention_eight_bit`), in torch: the specification.

    q8         (batch, heads, tokens, 128) int8; q is q8 * q_scales / LOG2_SCALE, a scale for every query
    k8         (batch, heads, tokens, 128) int8; k is k8 * k_scales, a scale for every block of 128 keys
    v8         (batch * heads * 128, padded tokens) e4m3: channels down, keys across, zeros behind the last token
    q_scales   (batch, heads, tokens) float32, with the factor of softmax in powers of two in it
    k_scales   (batch * heads, blocks) float32
    exponents  (batch * heads, blocks) float32, whole numbers: v8 is v / 2^exponent of the block of 128 keys

Scales are the smallest that hold the largest value, so nothing is cut off. Queries and keys of FLUX are normalised: an
int8 step is about 1/35 of their root mean square, which moves a logit by 1 % of its standard deviation. e4m3 would move
it by 4 %, and products in eight bits in front of it have moved it by as much.

A power of two a block costs the second product nothing: P carries it in its own exponent. It is the smallest with which
the block's largest value fits, and e4m3 keeps its three bits for values down to 1/28000 of that.

Eight-bit products want the right operand with neighbouring keys, so v has to be transposed anyway, and keys and
channels may take any order on the way:

    place 4 t + 2 h + b of every 16 holds key 8 h + 2 t + b
    row 8 g + 2 t + b of every 32 holds channel 8 t + 2 g + b
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

HEAD = 128  # channels of a head
BLOCK = 128  # keys with one scale and one exponent
SMALLEST, LARGEST = -60, 120  # exponents: float32 holds 2^-exponent, and sums of it
LEAST = 2.0**-100  # what counts as the largest value of zeros: a scale must not be zero
STEPS = 127.0  # of int8 on either side of zero
LOG2_SCALE = math.log2(math.e) / math.sqrt(HEAD)


class Codes(NamedTuple):
    """What `attention_eight_bit_kernel` multiplies."""

    q8: torch.Tensor
    k8: torch.Tensor
    v8: torch.Tensor
    q_scales: torch.Tensor
    k_scales: torch.Tensor
    exponents: torch.Tensor


def codes_in_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Codes:
    """The specification: q, k, v (batch, heads, tokens, 128) in any float type."""
    batch, heads, tokens, _ = k.shape
    blocks = -(-tokens // BLOCK)
    q_largest = _largest(q.float(), (-1,))
    k_largest = _largest(_blocks(k), (-1, -2))
    of_key = k_largest.repeat_interleave(BLOCK, 1)[:, :tokens].reshape(batch, heads, tokens)
    v8, exponents = values_in_torch(v)
    return Codes(
        _rounded(q, q_largest),
        _rounded(k, of_key),
        v8,
        q_largest * (LOG2_SCALE / STEPS),
        k_largest.reshape(batch * heads, blocks) * (1 / STEPS),
        exponents,
    )


def _largest(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """The largest magnitude, NaN where anything is."""
    return x.abs().amax(dims).clamp_min(LEAST)


def _rounded(x: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """int8 of x / largest * 127; the product is rounded once, to even."""
    return (x.double() * (STEPS / largest).double()[..., None]).round().to(torch.int8)


def _blocks(x: torch.Tensor) -> torch.Tensor:
    """(batch * heads, blocks, 128, 128) in float32, zeros behind the last token."""
    batch, heads, tokens, head = x.shape
    blocks = -(-tokens // BLOCK)
    padded = torch.nn.functional.pad(x.float(), (0, 0, 0, blocks * BLOCK - tokens))
    return padded.reshape(batch * heads, blocks, BLOCK, head)


# values ---------------------------------------------------------------------------------------------------------------


def key_at_place(place: torch.Tensor) -> torch.Tensor:
    """The key that is stored at a place of a row."""
    return (place & ~15) | (place >> 1 & 1) << 3 | (place >> 2 & 3) << 1 | place & 1


def row_of_channel(channel: torch.Tensor) -> torch.Tensor:
    """The row in which a channel is stored."""
    return (channel & ~31) | (channel >> 1 & 3) << 3 | (channel >> 3 & 3) << 1 | channel & 1


def values_in_torch(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """v8 and exponents of v (batch, heads, tokens, 128) in any float type."""
    batch, heads, _, head = v.shape
    tiles = _blocks(v)
    largest = tiles.abs().amax((-1, -2))
    mantissa, exponent = torch.frexp(largest)  # largest is mantissa * 2^exponent, mantissa from 1/2 below 1
    exponent = torch.where(largest > 0, exponent - 9 + (mantissa > 0.875), SMALLEST).clamp(SMALLEST, LARGEST)
    scaled = torch.ldexp(tiles, -exponent[..., None, None]).to(torch.float8_e4m3fn)
    turned = scaled.view(torch.uint8).transpose(-1, -2)[..., key_at_place(torch.arange(BLOCK, device=v.device))]
    rows = torch.empty_like(turned)
    rows[:, :, row_of_channel(torch.arange(head, device=v.device))] = turned
    v8 = rows.transpose(1, 2).reshape(batch * heads * head, tiles.shape[1] * BLOCK)
    return v8.view(torch.float8_e4m3fn), exponent.float()
