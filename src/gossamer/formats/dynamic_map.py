"""The signed 8-bit dynamic map in blocks: how nf4-dq and fp4-dq keep their block scales.

Storage:
    codes   (n,)               uint8, place in the map
    scale   (ceil(n / block),) float32, largest magnitude of each block

Range: the map holds 0, 1 and, for each decade e = 0 ... 6, the centres of 2^e equal cells of [0.1, 1] times
10^(e - 6), with both signs: fine near zero on a relative scale, fine near one on an absolute scale
("8-Bit Optimizers via Block-wise Quantization", arXiv 2110.02861). The smallest entry is -0.993, not -1.
Formula: x = map[codes] * scale

bitsandbytes on CPU does not compare with the 256 entries directly: it rounds x / scale to one of 65536 even levels of
[-1, 1] first. Equal bytes need the same detour; it moves a value by at most 1 / 65535 of its scale.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

DECADES = 7
LAST_LEVEL = 65535


@cache
def dynamic_map(device: torch.device) -> torch.Tensor:
    """The 256 float32 values in rising order."""
    # made on the CPU, whose linspace defines the bits
    exact: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    entries = [torch.tensor([0.0, 1.0], **exact)]
    for decade in range(DECADES):
        edges = torch.linspace(0.1, 1.0, 2**decade + 1, **exact)
        centres = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade + 1 - DECADES)
        entries += [centres, -centres]
    return torch.cat(entries).sort().values.to(device)


def _per_value(scale: torch.Tensor, count: int, block: int) -> torch.Tensor:
    return scale.repeat_interleave(block)[:count]


def pack_dynamic(values: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a float32 line (n,). A block of zeros gets code 0, which its scale of 0 turns into 0."""
    padded = torch.nn.functional.pad(values, (0, -values.numel() % block)).view(-1, block)
    scale = padded.abs().amax(dim=1)
    # a subnormal scale has an infinite reciprocal, which makes zeros NaN; bitsandbytes puts those on the lowest entry
    unit = (values * _per_value(1.0 / scale, values.numel(), block)).nan_to_num(nan=-1.0).clamp_(-1.0, 1.0)
    level = ((unit + 1.0) * 0.5 * LAST_LEVEL + 0.5).int()
    entries = dynamic_map(values.device)
    codes = torch.bucketize(2.0 * level / LAST_LEVEL - 1.0, (entries[:-1] + entries[1:]) / 2).to(torch.uint8)
    return torch.where(_per_value(scale, values.numel(), block) == 0, 0, codes).to(torch.uint8), scale


def unpack_dynamic(codes: torch.Tensor, scale: torch.Tensor, block: int) -> torch.Tensor:
    """The float32 line (n,) that codes and scales stand for."""
    values = dynamic_map(codes.device).index_select(0, codes.int())
    return values.mul_(_per_value(scale, codes.numel(), block))
