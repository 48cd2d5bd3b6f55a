"""Edge maps of pictures, white lines on black as of a Canny detector, and how well two agree.

Blur, Sobel gradient of the strongest channel, thinning to the ridge across each edge, two thresholds: strong edges
stay, weak ones where they hang on a strong one. All vectorised over pictures.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

from gossamer.demo.filters import blur, shift

SIGMA = 1.2  # of the blur, in pixels
LOW, HIGH = 0.018, 0.045  # gradient per pixel, of values in [0, 1]
GROWTH = 24  # pixels that a weak edge may run on from a strong one
TOLERANCE = 2  # pixels by which edges may be apart and still agree


def edge_map(picture: Tensor) -> Tensor:
    """Edges of pictures (B, 3, H, W) in [0, 1], as 0 and 1 in the same shape."""
    across, down = gradient(picture)
    ridge = thin((across * across + down * down).sqrt(), across, down)
    strong, weak = (ridge > HIGH).to(picture.dtype), (ridge > LOW).to(picture.dtype)
    for _ in range(GROWTH):
        strong = functional.max_pool2d(strong, 3, stride=1, padding=1) * weak
    return strong.expand(-1, 3, -1, -1).contiguous()


def gradient(picture: Tensor) -> tuple[Tensor, Tensor]:
    """Slope across and down, per pixel, of the channel where it is steepest: two (B, 1, H, W)."""
    smooth = blur(picture, SIGMA)
    beside, below = shift(smooth, 0, 1) - shift(smooth, 0, -1), shift(smooth, 1, 0) - shift(smooth, -1, 0)
    across = (2.0 * beside + shift(beside, 1, 0) + shift(beside, -1, 0)) / 8.0
    down = (2.0 * below + shift(below, 0, 1) + shift(below, 0, -1)) / 8.0
    steepest = (across * across + down * down).argmax(1, keepdim=True)
    return across.gather(1, steepest), down.gather(1, steepest)


def thin(strength: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Keeps strengths that no neighbour along the gradient exceeds; of two equal ones the first stays."""
    flat, steep = across.abs() * 0.41421356, down.abs() * 0.41421356  # tangent of 22.5 degrees
    level, upright = down.abs() <= flat, across.abs() <= steep
    falling = across * down > 0
    ahead = torch.where(falling, shift(strength, 1, 1), shift(strength, -1, 1))
    back = torch.where(falling, shift(strength, -1, -1), shift(strength, 1, -1))
    ahead = torch.where(level, shift(strength, 0, 1), torch.where(upright, shift(strength, 1, 0), ahead))
    back = torch.where(level, shift(strength, 0, -1), torch.where(upright, shift(strength, -1, 0), back))
    return strength * ((strength >= ahead) & (strength > back))


def edge_agreement(picture: Tensor, edges: Tensor) -> Tensor:
    """F1 of the edges of `picture` against the map `edges`, both (B, 3, H, W), within `TOLERANCE` pixels: (B,).

    Pictures without edges agree fully with a map without edges.
    """
    found, wanted = edge_map(picture)[:, :1] > 0.5, edges.amax(1, keepdim=True) > 0.5
    precision, recall = covered(found, wanted), covered(wanted, found)
    f1 = 2.0 * precision * recall / (precision + recall).clamp_min(1e-9)
    neither = ~(found.flatten(1).any(1) | wanted.flatten(1).any(1))
    return torch.where(neither, torch.ones_like(f1), f1)


def covered(edges: Tensor, by: Tensor) -> Tensor:
    """Share of the pixels of `edges` with one of `by` within the tolerance: (B,); 0 where there are none."""
    near = functional.max_pool2d(by.to(torch.float32), 2 * TOLERANCE + 1, stride=1, padding=TOLERANCE) > 0.5
    return (edges & near).flatten(1).sum(1) / edges.flatten(1).sum(1).clamp_min(1)
