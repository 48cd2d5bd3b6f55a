"""Small picture filters that styles, scores and edge maps share: blurs, shifts and luminance, all (B, C, H, W)."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

LUMA = (0.2126, 0.7152, 0.0722)  # Rec. 709 weights of red, green and blue


def luminance(picture: Tensor) -> Tensor:
    """Weighted sum of the channels: (B, 3, H, W) to (B, 1, H, W)."""
    weights = torch.tensor(LUMA, dtype=picture.dtype, device=picture.device)[:, None, None]
    return (picture * weights).sum(1, keepdim=True)


def chroma(picture: Tensor) -> Tensor:
    """Largest minus smallest channel: (B, 1, H, W)."""
    return picture.amax(1, keepdim=True) - picture.amin(1, keepdim=True)


def blur(picture: Tensor, sigma: float) -> Tensor:
    """Gaussian blur with a standard deviation in pixels; the border repeats the outermost pixels."""
    reach = max(1, round(3 * sigma))
    at = torch.arange(-reach, reach + 1, dtype=picture.dtype, device=picture.device)
    weights = torch.exp(-0.5 * (at / sigma) ** 2)
    weights = weights / weights.sum()
    channels = picture.shape[1]
    wide = functional.pad(picture, (reach, reach, reach, reach), mode="replicate")
    rows = functional.conv2d(wide, weights.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return functional.conv2d(rows, weights.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)


def shift(picture: Tensor, down: int, right: int) -> Tensor:
    """The value `down` rows below and `right` columns to the right of each pixel; the border repeats."""
    reach = max(abs(down), abs(right))
    height, width = picture.shape[-2:]
    wide = functional.pad(picture, (reach, reach, reach, reach), mode="replicate")
    return wide[..., reach + down : reach + down + height, reach + right : reach + right + width]


def ramp(low: float, high: float, value: Tensor) -> Tensor:
    """0 below `low`, 1 above `high`, straight between."""
    return ((value - low) / (high - low)).clamp(0.0, 1.0)
