"""How close two pictures or two tensors are.

    psnr   10 log10(1 / mean((a - b)^2)), in dB, for pictures in [0, 1]
    ssim   mean over pixels and channels of
           (2 ma mb + c1) (2 sab + c2) / ((ma^2 + mb^2 + c1) (saa + sbb + c2))
           with ma, mb the means, saa, sbb, sab the (co)variances under an 11x11 Gaussian window of sigma 1.5,
           c1 = 0.01^2, c2 = 0.03^2 (Wang et al. 2004)
    relative_error  |a - b| / |b|, Euclidean norms over all values

Pictures are (B, 3, H, W); each function gives one value a picture. `relative_error` gives one value in all.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from gossamer.errors import InvalidOptionError

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def psnr(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each picture pair in dB (B,); infinite where they are equal."""
    _check_pictures(one, two)
    error = (one.double() - two.double()).square().mean(dim=(1, 2, 3))
    return -10.0 * error.log10()


def ssim(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each picture pair (B,), over the pixels whose whole window is inside the picture."""
    _check_pictures(one, two)
    if min(one.shape[2:]) < WINDOW:
        raise InvalidOptionError(
            "These pictures are too small to compare by structure.",
            f"They are {one.shape[3]}x{one.shape[2]}; the window is {WINDOW}x{WINDOW}.",
            "Compare larger pictures, or use psnr.",
        )
    a, b = one.double(), two.double()
    mean_a, mean_b = _smooth(a), _smooth(b)
    var_a = _smooth(a * a) - mean_a * mean_a
    var_b = _smooth(b * b) - mean_b * mean_b
    covariance = _smooth(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a.square() + mean_b.square() + C1)
    structure = (2 * covariance + C2) / (var_a + var_b + C2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """|value - reference| / |reference|; 0 for equal tensors, infinite where only the reference is all zero."""
    if value.shape != reference.shape:
        raise _shapes_differ(value, reference)
    a, b = value.double(), reference.double()
    distance = torch.linalg.vector_norm(a - b)
    return 0.0 if distance == 0 else float(distance / torch.linalg.vector_norm(b))


def _smooth(x: torch.Tensor) -> torch.Tensor:
    """Gaussian means of (B, C, H, W) where the window fits: (B, C, H - 10, W - 10)."""
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weights = torch.exp(-0.5 * (offsets / SIGMA).square())
    weights = (weights / weights.sum()).expand(x.shape[1], 1, 1, WINDOW)
    x = functional.conv2d(x, weights, groups=x.shape[1])
    return functional.conv2d(x, weights.transpose(2, 3), groups=x.shape[1])


def _check_pictures(one: torch.Tensor, two: torch.Tensor) -> None:
    if one.shape != two.shape:
        raise _shapes_differ(one, two)
    if one.dim() != 4 or not (one.is_floating_point() and two.is_floating_point()):
        raise InvalidOptionError(
            "These are not pictures that can be compared.",
            f"They are {one.dtype} and {two.dtype} of shape {tuple(one.shape)}.",
            "Give floats in [0, 1] of shape (batch, channels, height, width).",
        )


def _shapes_differ(one: torch.Tensor, two: torch.Tensor) -> InvalidOptionError:
    return InvalidOptionError(
        "Two tensors of different shapes cannot be compared.",
        f"One is {tuple(one.shape)}, the other {tuple(two.shape)}.",
        "Compare results of the same size.",
    )
