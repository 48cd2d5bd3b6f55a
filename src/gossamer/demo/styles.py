"""Two picture styles drawn from what the renderer knows of a scene, and measures of how far a picture is in a style.

`pencil`  graphite on warm paper: contour lines, hatching that grows denser with darkness, a little crayon
`neon`    glowing outlines in the objects' colours on near black, mirrored faintly in the floor

Drawn at twice the size and averaged, so that lines are smooth. The measures look at a picture alone, never at a scene.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as functional
from torch import Tensor

from gossamer.demo.filters import blur, chroma, luminance, ramp, shift
from gossamer.demo.look import SceneBatch
from gossamer.demo.march import Compile, identity
from gossamer.demo.render import Buffers, Layer, render_buffers
from gossamer.demo.shading import smoothstep, to_srgb
from gossamer.errors import UnknownOptionError

STYLES = ("pencil", "neon")

FINE = 2  # drawn pixels a picture pixel, along each side
PAPER = (0.965, 0.945, 0.900)
GRAPHITE = (0.20, 0.20, 0.23)
HATCH_PERIOD = 5.5  # picture pixels from stroke to stroke
HATCHES = ((0.82, 0.20), (2.05, 0.46), (1.45, 0.70))  # direction in radians, darkness from which it is drawn
CREASE = (0.32, 0.62)  # 1 - cosine of the angle between normals four reaches apart: from no line to a full one
NIGHT = (0.020, 0.018, 0.045)


def render_styled(
    batch: SceneBatch, style: str, size: int | tuple[int, int] = 256, compile: Compile = identity, chunk: int = 1
) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] of the scenes, drawn in one of `STYLES`."""
    draw = {"pencil": pencil, "neon": neon}.get(style)
    if draw is None:
        raise UnknownOptionError(f"No picture style is called {style!r}.", f"Styles: {', '.join(STYLES)}.", "Pick one.")
    height, width = (size, size) if isinstance(size, int) else size
    pictures = []
    for start in range(0, len(batch), chunk):
        buffers = render_buffers(batch[start : start + chunk], (height * FINE, width * FINE), compile)
        pictures.append(functional.avg_pool2d(draw(buffers), FINE).clamp(0.0, 1.0))
    return torch.cat(pictures)


def outline(layer: Layer, reach: int) -> Tensor:
    """Lines (B, 1, H, W) in [0, 1] on the solids' own pixels: silhouettes, solids in front of others, and creases.

    `reach` is the width of a silhouette in drawn pixels.
    """
    line = torch.zeros_like(layer.depth)
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        step = reach if 0 in (down, right) else max(1, round(reach * 0.7))
        one, other = (step * down, step * right), (-step * down, -step * right)
        for side in (one, other):
            behind = (shift(layer.solid, *side) == 0) | (shift(layer.depth, *side) > layer.depth)
            line = torch.maximum(line, ((shift(layer.solid, *side) != layer.solid) & behind).to(line.dtype))
        one, other = ((2 * one[0], 2 * one[1]), (2 * other[0], 2 * other[1]))
        same = (shift(layer.solid, *one) == layer.solid) & (shift(layer.solid, *other) == layer.solid)
        bend = 1.0 - (shift(layer.normal, *one) * shift(layer.normal, *other)).sum(1, keepdim=True)
        line = torch.maximum(line, smoothstep(*CREASE, bend) * same)
    return line * (layer.solid > 0)


def colour(values: tuple[float, float, float], like: Tensor) -> Tensor:
    """A colour that broadcasts over pictures."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]


def waves(height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns in picture pixels (H, W), and a slow wobble of a few pixels, as of an unsteady hand."""
    y = torch.arange(height, dtype=like.dtype, device=like.device)[:, None] / FINE
    x = torch.arange(width, dtype=like.dtype, device=like.device)[None, :] / FINE
    wobble = (
        torch.sin(0.061 * x + 0.043 * y) + torch.sin(0.029 * x - 0.083 * y + 1.7) + 0.5 * torch.sin(0.13 * x + 0.11 * y)
    )
    return y, x, wobble


def hatching(darkness: Tensor) -> Tensor:
    """Ink (B, 1, H, W) of crossed strokes, wider where it is darker."""
    y, x, wobble = waves(darkness.shape[-2], darkness.shape[-1], darkness)
    paper = torch.ones_like(darkness)
    for angle, start in HATCHES:
        across = x * math.cos(angle) + y * math.sin(angle) + 0.8 * wobble
        ridge = 0.5 + 0.5 * torch.cos(across * (2 * math.pi / HATCH_PERIOD))
        width = smoothstep(start - 0.08, start + 0.30, darkness)
        paper = paper * (1.0 - 0.58 * smoothstep(0.40, 0.90, ridge) * width)
    return 1.0 - paper


def grain(like: Tensor) -> Tensor:
    """The tooth of the paper around 0: (1, 1, H, W), the same on every sheet."""
    y, x, wobble = waves(like.shape[-2], like.shape[-1], like)
    tooth = torch.sin(0.71 * x + 1.3 * wobble) * torch.sin(0.67 * y - 1.1 * wobble)
    return tooth[None, None]


def pencil(buffers: Buffers) -> Tensor:
    """Graphite and crayon on paper."""
    seen = buffers.seen
    solid = (seen.solid > 0).to(seen.depth.dtype)
    tooth = grain(seen.depth)
    tint = to_srgb(seen.albedo)
    tint = tint + 0.10 * (luminance(tint) - tint)
    cover = solid * (0.76 + 0.04 * tooth) * (1.0 - 0.25 * smoothstep(0.0, 0.3, 0.3 - buffers.darkness))
    sheet = colour(PAPER, tint) * (1.0 + 0.012 * tooth)
    drawn = sheet * (1.0 - cover) + tint * colour(PAPER, tint) * cover
    shade = solid * buffers.darkness + (1.0 - solid) * (1.3 * buffers.darkness - 0.12).clamp(0.0, 0.70)
    ink = 1.0 - (1.0 - hatching(shade)) * (1.0 - 0.22 * smoothstep(0.15, 0.7, shade))
    line = blur(outline(seen, 2), 0.6)
    ink = 1.0 - (1.0 - ink) * (1.0 - 0.92 * (1.25 * line).clamp(0.0, 1.0) * (0.9 + 0.08 * tooth))
    return drawn * (1.0 - ink) + colour(GRAPHITE, tint) * ink


def glow(layer: Layer) -> Tensor:
    """The colour that an object's tube shines in: its own, as bright as it gets."""
    tint = to_srgb(layer.albedo)
    return tint / tint.amax(1, keepdim=True).clamp_min(1e-3)


def neon(buffers: Buffers) -> Tensor:
    """Glowing tubes in the dark."""
    seen, below = buffers.seen, buffers.mirrored
    tube = blur(outline(seen, 3), 0.8) * glow_around(seen)
    floor = (seen.solid == 0).to(tube.dtype)
    faded = torch.exp(-1.3 * below.depth.clamp_max(8.0)) * floor
    reflected = blur(outline(below, 3) * glow(below) * faded, 2.0)
    halo = 1.2 * blur(tube, 3.0) + 1.3 * spread(tube, 9.0) + 1.5 * spread(tube, 26.0)
    inside = (1.0 - floor) * glow(seen) * (0.03 + 0.13 * luminance(buffers.picture))
    core = blur(outline(seen, 2), 0.7)
    light = colour(NIGHT, tube) + inside + 1.3 * tube + halo + 0.6 * reflected + 0.45 * core
    return 1.0 - torch.exp(-1.25 * light)


def spread(light: Tensor, sigma: float) -> Tensor:
    """A wide blur, computed at a quarter of the size, where it looks the same."""
    small = blur(functional.avg_pool2d(light, 4, ceil_mode=True), sigma / 4)
    return functional.interpolate(small, light.shape[-2:], mode="bilinear", align_corners=False)


def glow_around(layer: Layer) -> Tensor:
    """The solids' colours, grown a little past their edges so that a blurred line keeps its colour."""
    wide = functional.max_pool2d(glow(layer) * (layer.solid > 0), 5, stride=1, padding=2)
    return torch.where(layer.solid > 0, glow(layer), wide)


def style_score(picture: Tensor, style: str) -> Tensor:
    """How far pictures (B, 3, H, W) are in a style, each in [0, 1]: (B,). No scene or prompt is looked at."""
    score = {"pencil": pencil_score, "neon": neon_score}.get(style)
    if score is None:
        raise UnknownOptionError(f"No picture style is called {style!r}.", f"Styles: {', '.join(STYLES)}.", "Pick one.")
    return score(picture)


def share(mask: Tensor) -> Tensor:
    """Mean over a picture: (B,)."""
    return mask.to(torch.float32).flatten(1).mean(1)


def pencil_score(picture: Tensor) -> Tensor:
    """Much bright, nearly colourless, warm paper, times fine dark lines."""
    light, paper = luminance(picture), blur(picture, 4.0)
    warm = (paper[:, :1] - paper[:, 2:]) > 0.02
    sheet = share((luminance(paper) > 0.80) & (chroma(paper) < 0.14) & warm)
    lines = share((blur(light, 3.0) - light) > 0.06)
    return ramp(0.25, 0.55, sheet) * ramp(0.004, 0.016, lines)


def neon_score(picture: Tensor) -> Tensor:
    """Much near black, times thin bright lines that stand out from what is around them."""
    light = picture.amax(1, keepdim=True)
    dark = share(light < 0.20)
    lines = share((light - blur(light, 4.0)) > 0.16)
    return ramp(0.30, 0.55, dark) * ramp(0.003, 0.009, lines)
