"""nf4, fp4: four bits a value in blocks of 64, the bytes that bitsandbytes writes; -dq compresses the block scales too.

The matrix is read row by row as one line of n = out * in values; a block may cross from one row into the next.

Storage:
    codes           (ceil(n / 2),)     uint8, two values: the earlier in the high four bits; an odd n is padded with 0
    absmax          (ceil(n / 64),)    float32, largest magnitude of each block                  (nf4, fp4)
    absmax_codes    (ceil(n / 64),)    uint8, place of absmax - offset in the dynamic map         (nf4-dq, fp4-dq)
    absmax_scale    (ceil(n / 16384),) float32, largest magnitude of 256 of those differences     (nf4-dq, fp4-dq)
    absmax_offset   (1,)               float32, mean of absmax                                    (nf4-dq, fp4-dq)

Range: -absmax to absmax. nf4: 16 quantiles of the normal distribution; fp4: 1 sign, 2 exponent, 1 fraction bit.
Formula: absmax = dynamic_map[absmax_codes] * absmax_scale + absmax_offset, for the -dq pair
         w = values[code] * absmax[block], in float32, then rounded once to the wanted type
"""

from __future__ import annotations

from functools import cache, partial

import torch

from gossamer.formats.checks import require_packable
from gossamer.formats.dynamic_map import pack_dynamic, unpack_dynamic
from gossamer.formats.packed import Format, Packed

BLOCK = 64
NESTED_BLOCK = 256

# Appendix E of "QLoRA: Efficient Finetuning of Quantized LLMs" (arXiv 2305.14314), value by code.
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# Magnitudes of the three low bits, in twelfths of the largest; the high bit is the sign. The order is bitsandbytes'.
FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4_VALUES = tuple(sign * magnitude / 12.0 for sign in (1.0, -1.0) for magnitude in FP4_TWELFTHS)

VALUES = {"nf4": NF4_VALUES, "fp4": FP4_VALUES}


def _ceil_div(count: int, size: int) -> int:
    return -(-count // size)


def _rounding(kind: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Midpoints (15,) between neighbouring values, and the code (16,) of each value in rising order."""
    values, codes = torch.tensor(VALUES[kind], dtype=torch.float32, device=device).sort(stable=True)
    return (values[:-1] + values[1:]) / 2, codes.to(torch.uint8)


@cache
def _byte_values(kind: str, device: torch.device) -> torch.Tensor:
    """The two float32 values of every byte as one 8-byte element (256,): one look-up then decodes two weights."""
    values = torch.tensor(VALUES[kind], dtype=torch.float32, device=device)
    byte = torch.arange(256, device=device)
    return torch.stack((values[byte >> 4], values[byte & 15]), dim=1).view(torch.int64).squeeze(1)


def _normalised(flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values in [-1, 1] and absmax of each block.

    Whole blocks are multiplied by a reciprocal, the short last one is divided, and an absmax of zero is stored as 1e-38
    in the last one only: bitsandbytes does so, and equal bytes need equal rounding.
    """
    tail = flat.numel() % BLOCK
    whole = flat[: flat.numel() - tail].view(-1, BLOCK)
    absmax = whole.abs().amax(dim=1)
    scaled = (whole * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp_(-1, 1).view(-1)
    if tail:
        last = flat[-tail:]
        last_absmax = last.abs().amax(dim=0, keepdim=True).clamp(min=1e-38)
        absmax = torch.cat((absmax, last_absmax))
        scaled = torch.cat((scaled, (last / last_absmax).clamp_(-1, 1)))
    return scaled, absmax


def _pack(weight: torch.Tensor, *, kind: str, storage: str) -> Packed:
    require_packable(weight, storage)
    scaled, absmax = _normalised(weight.detach().float().reshape(-1))
    if scaled.numel() % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    midpoints, code_of = _rounding(kind, weight.device)
    codes = code_of[torch.bucketize(scaled, midpoints, out_int32=True)]
    tensors = {"codes": (codes[::2] << 4) | codes[1::2]}
    tensors |= _pack_absmax(absmax) if storage.endswith("-dq") else {"absmax": absmax}
    return Packed(storage, tensors, (weight.shape[0], weight.shape[1]))


def _pack_absmax(absmax: torch.Tensor) -> dict[str, torch.Tensor]:
    offset = absmax.mean()
    codes, scale = pack_dynamic(absmax - offset, NESTED_BLOCK)
    return {"absmax_codes": codes, "absmax_scale": scale, "absmax_offset": offset.reshape(1)}


def block_scales(packed: Packed) -> torch.Tensor:
    """Float32 (blocks,): the scale of each block, decoded where it is compressed."""
    tensors = packed.tensors
    if "absmax" in tensors:
        return tensors["absmax"]
    differences = unpack_dynamic(tensors["absmax_codes"], tensors["absmax_scale"], NESTED_BLOCK)
    return differences.add_(tensors["absmax_offset"])


def _unpack(packed: Packed, dtype: torch.dtype, *, kind: str) -> torch.Tensor:
    codes, absmax = packed.tensors["codes"], block_scales(packed)
    count = packed.shape[0] * packed.shape[1]
    flat = _byte_values(kind, codes.device).index_select(0, codes.int()).view(torch.float32)[:count]
    whole = count - count % BLOCK
    flat[:whole].view(-1, BLOCK).mul_(absmax[: whole // BLOCK, None])
    flat[whole:].mul_(absmax[whole // BLOCK :])
    return flat.view(packed.shape).to(dtype)


def _packed_bytes(out_features: int, in_features: int, *, nested: bool) -> int:
    count = out_features * in_features
    blocks = _ceil_div(count, BLOCK)
    scales = blocks + 4 * _ceil_div(blocks, NESTED_BLOCK) + 4 if nested else 4 * blocks
    return _ceil_div(count, 2) + scales


FORMATS = tuple(
    Format(
        kind + suffix,
        partial(_pack, kind=kind, storage=kind + suffix),
        partial(_unpack, kind=kind),
        partial(_packed_bytes, nested=bool(suffix)),
    )
    for suffix in ("", "-dq")
    for kind in VALUES
)
