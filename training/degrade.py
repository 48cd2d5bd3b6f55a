"""Flaws that a generator's pictures have and a renderer's have not, for training the scene reader.

Small bends, blur, lost resolution, 8x8 blocks, blotches, noise, and shifts of tone small enough to leave every colour
its name. A batch is cut into groups that share the kinds and strengths of flaws; tone and noise differ by picture.
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor
from torch.nn import functional

GROUPS = 8
BLOCK = 8  # pixels a side, as in JPEG


def degrade(pictures: Tensor, rng: random.Random) -> Tensor:
    """Flawed copies of pictures (B, 3, H, W) in [0, 1]; about one group in eight stays as it is."""
    return torch.cat([_flaw(group, rng) for group in pictures.chunk(GROUPS)])


def blot_out(pictures: Tensor) -> Tensor:
    """Pictures (B, 3, 256, 256) so blurred, to 12x12 samples, that no shape in them can be told from another."""
    small = functional.interpolate(pictures, (12, 12), mode="area")
    return functional.interpolate(small, pictures.shape[2:], mode="bicubic").clamp(0, 1)


def _flaw(pictures: Tensor, rng: random.Random) -> Tensor:
    if rng.random() < 1 / 8:
        return pictures
    if rng.random() < 0.7:
        pictures = bend(pictures, pixels=rng.uniform(0.5, 3.0))
    if rng.random() < 0.5:
        pictures = blur(pictures, sigma=rng.uniform(0.3, 1.8))
    if rng.random() < 0.3:
        pictures = shrink_and_grow(pictures, factor=rng.uniform(0.45, 0.9))
    if rng.random() < 0.3:
        pictures = quantise_blocks(pictures, step=rng.uniform(0.02, 0.25))
    if rng.random() < 0.4:
        pictures = pictures + blotches(pictures, cells=rng.choice((6, 12, 24, 48)), strength=rng.uniform(0.01, 0.05))
    pictures = shift_tone(pictures)
    if rng.random() < 0.5:
        pictures = pictures + rng.uniform(0.005, 0.06) * torch.randn_like(pictures)
    return pictures.clamp(0, 1)


def bend(pictures: Tensor, pixels: float) -> Tensor:
    """Move pixels along a smooth random field, by up to about `pixels`."""
    batch, _, height, width = pictures.shape
    cells = 2.0 * torch.rand(batch, 2, 6, 6, device=pictures.device) - 1.0
    field = functional.interpolate(cells, (height, width), mode="bicubic", align_corners=True)
    straight = functional.affine_grid(
        torch.eye(2, 3, device=pictures.device).expand(batch, 2, 3), list(pictures.shape), align_corners=False
    )
    grid = straight + field.permute(0, 2, 3, 1) * (2.0 * pixels / width)
    return functional.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


def blur(pictures: Tensor, sigma: float) -> Tensor:
    """Gaussian blur; `sigma` in pixels, at most 2."""
    offsets = torch.arange(-5, 6, device=pictures.device, dtype=pictures.dtype)
    weights = torch.exp(-0.5 * (offsets / sigma).square())
    weights = (weights / weights.sum()).expand(3, 1, 1, 11)
    padded = functional.pad(pictures, (5, 5, 5, 5), mode="replicate")
    return functional.conv2d(functional.conv2d(padded, weights, groups=3), weights.transpose(2, 3), groups=3)


def shrink_and_grow(pictures: Tensor, factor: float) -> Tensor:
    """Lose resolution."""
    height, width = pictures.shape[2:]
    small = functional.interpolate(
        pictures, (round(height * factor), round(width * factor)), mode="bilinear", antialias=True
    )
    return functional.interpolate(small, (height, width), mode="bilinear")


def quantise_blocks(pictures: Tensor, step: float) -> Tensor:
    """Round the cosine transform of each 8x8 block; `step` for the highest frequency, less for lower ones."""
    batch, channels, height, width = pictures.shape
    index = torch.arange(BLOCK, device=pictures.device, dtype=pictures.dtype)
    basis = torch.cos(math.pi / BLOCK * (index + 0.5) * index[:, None]) * math.sqrt(2 / BLOCK)
    basis[0] /= math.sqrt(2)  # rows are orthonormal
    steps = step * (1 + index[:, None] + index) / (2 * BLOCK - 1)
    blocks = pictures.reshape(batch, channels, height // BLOCK, BLOCK, width // BLOCK, BLOCK).transpose(3, 4)
    waves = basis @ blocks @ basis.T
    blocks = basis.T @ ((waves / steps).round() * steps) @ basis
    return blocks.transpose(3, 4).reshape(pictures.shape)


def blotches(pictures: Tensor, cells: int, strength: float) -> Tensor:
    """Smooth random colour noise of the pictures' shape, `cells` patches across."""
    batch, _, height, width = pictures.shape
    coarse = strength * torch.randn(batch, 3, cells, cells, device=pictures.device)
    return functional.interpolate(coarse, (height, width), mode="bilinear")


def shift_tone(pictures: Tensor) -> Tensor:
    """Small changes of gamma, contrast, brightness, saturation and white balance, different for every picture."""
    batch = len(pictures)

    def around_one(spread: float, channels: int = 1) -> Tensor:
        return 1 + spread * (2 * torch.rand(batch, channels, 1, 1, device=pictures.device) - 1)

    toned = pictures.clamp(0, 1) ** around_one(0.12)
    grey = toned.mean(dim=1, keepdim=True)
    toned = grey + (toned - grey) * around_one(0.15)
    middle = toned.mean(dim=(1, 2, 3), keepdim=True)
    toned = middle + (toned - middle) * around_one(0.15)
    return toned * around_one(0.10) * around_one(0.04, channels=3)
