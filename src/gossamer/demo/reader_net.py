"""The scene reader's network: from a picture to a grid of possible object centres (in the manner of CenterNet).

Input (B, 3, 256, 256) in [0, 1]. Output (B, 22, 64, 64), one cell for 4x4 pixels:

    channels  meaning
    0-4       heat: logit that an object of this shape has its centre in the cell
    5-12      colour logits
    13-15     size logits
    16-18     material logits
    19-21     x, z of the centre and height of the underside, in world units

Everything but the heat means something only in cells near a centre.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from gossamer.demo.scene import COLOURS, MATERIALS, RADIUS, SHAPES

PICTURE = 256  # pixels a side
STRIDE = 4  # pixels a cell
GRID = PICTURE // STRIDE
PLACE = 3  # x, z, base
SPLIT = (len(SHAPES), len(COLOURS), len(RADIUS), len(MATERIALS), PLACE)

WIDTHS = (32, 48, 64, 64)  # channels at strides 4, 8, 16, 32
TRUNK = 40  # channels on the way back up


@dataclass(frozen=True)
class Maps:
    """The network's output by meaning, each (B, channels, rows, columns)."""

    heat: torch.Tensor
    colour: torch.Tensor
    size: torch.Tensor
    material: torch.Tensor
    place: torch.Tensor


def split_maps(output: torch.Tensor) -> Maps:
    """The channels of (B, 22, rows, columns) by meaning, in float32."""
    return Maps(*output.float().split(SPLIT, dim=1))


class Unit(nn.Module):
    """Convolution, normalisation, ReLU. Training sets `norm`; a stored reader has it folded into the convolution."""

    def __init__(self, inputs: int, outputs: int, size: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2)
        self.norm: nn.Module = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, inputs, h, w) to (B, outputs, h / stride, w / stride)."""
        return torch.relu(self.norm(self.conv(x)))


class Residual(nn.Module):
    """Two units beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(Unit(channels, channels), Unit(channels, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Keeps the shape."""
        y: torch.Tensor = self.body(x)
        return x + y


class ReaderNet(nn.Module):
    """Four stages down to stride 32, so that every cell sees the whole picture, and back up to stride 4."""

    def __init__(self) -> None:
        super().__init__()
        first, second, third, fourth = WIDTHS
        self.stages = nn.ModuleList(
            [
                nn.Sequential(Unit(3, 16, stride=2), Unit(16, first, stride=2), Residual(first)),
                nn.Sequential(Unit(first, second, stride=2), Residual(second)),
                nn.Sequential(Unit(second, third, stride=2), Residual(third), Residual(third)),
                nn.Sequential(Unit(third, fourth, stride=2), Residual(fourth)),
            ]
        )
        self.sides = nn.ModuleList([nn.Conv2d(width, TRUNK, 1) for width in WIDTHS])
        self.merges = nn.ModuleList([Unit(TRUNK, TRUNK) for _ in WIDTHS[1:]])
        self.head = nn.Sequential(Unit(TRUNK + 2, TRUNK), nn.Conv2d(TRUNK, sum(SPLIT), 1))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """(B, 3, 256, 256) in [0, 1] to (B, 22, 64, 64)."""
        x = 2.0 * pictures - 1.0
        levels = []
        for stage, side in zip(self.stages, self.sides, strict=True):
            x = stage(x)
            levels.append(side(x))
        trunk = levels.pop()
        for merge in self.merges:
            trunk = merge(nn.functional.interpolate(trunk, scale_factor=2.0) + levels.pop())
        output: torch.Tensor = self.head(torch.cat([trunk, _coordinates(trunk)], dim=1))
        return output


def _coordinates(like: torch.Tensor) -> torch.Tensor:
    """Each cell's column and row in [-1, 1], (B, 2, rows, columns): places are absolute, a convolution is not."""
    batch, _, rows, columns = like.shape
    across = torch.linspace(-1, 1, columns, device=like.device, dtype=like.dtype).expand(batch, 1, rows, columns)
    down = torch.linspace(-1, 1, rows, device=like.device, dtype=like.dtype)[:, None].expand(batch, 1, rows, columns)
    return torch.cat([across, down], dim=1)
