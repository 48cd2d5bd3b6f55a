"""How like their references many pictures are, in one record."""

from __future__ import annotations

from typing import TypedDict

import torch

from gossamer.bench.metrics import psnr, ssim

CHUNK = 50  # pictures at a time; SSIM holds about ten copies of them in float64


class Likeness(TypedDict):
    """PSNR in dB over the pictures that differ from their reference at all, None where none does; SSIM over all."""

    pictures: int
    identical: int
    psnr_mean: float | None
    psnr_median: float | None
    psnr_min: float | None
    ssim_mean: float


def likeness(pictures: torch.Tensor, references: torch.Tensor) -> Likeness:
    """Compare (B, 3, H, W) pictures in [0, 1] with their references, one by one."""
    pairs = list(zip(pictures.split(CHUNK), references.split(CHUNK), strict=True))
    decibels = torch.cat([psnr(one, two) for one, two in pairs]).cpu()
    structure = torch.cat([ssim(one, two) for one, two in pairs])
    differing = decibels[decibels != torch.inf].sort().values
    return Likeness(
        pictures=len(decibels),
        identical=len(decibels) - len(differing),
        psnr_mean=float(differing.mean()) if len(differing) else None,
        psnr_median=float(differing.quantile(0.5)) if len(differing) else None,
        psnr_min=float(differing[0]) if len(differing) else None,
        ssim_mean=float(structure.mean()),
    )
