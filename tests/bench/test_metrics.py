"""Metrics against scikit-image and against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from gossamer.bench.metrics import psnr, relative_error, ssim
from gossamer.errors import InvalidOptionError


@pytest.fixture(params=[0.01, 0.1, 0.5])
def pair(request):
    """Smooth pictures and copies with noise of a given strength."""
    generator = torch.Generator().manual_seed(7)
    coarse = torch.rand(3, 3, 6, 6, generator=generator)
    one = torch.nn.functional.interpolate(coarse, (48, 37), mode="bicubic").clamp(0, 1)
    two = (one + request.param * torch.randn(one.shape, generator=generator)).clamp(0, 1)
    return one, two


def test_psnr_is_scikit_images(pair):
    expected = [peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=1.0) for a, b in zip(*pair, strict=True)]
    np.testing.assert_allclose(psnr(*pair).numpy(), expected, rtol=1e-5)


def test_ssim_is_scikit_images(pair):
    expected = [
        structural_similarity(
            a.double().numpy(),
            b.double().numpy(),
            data_range=1.0,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(*pair, strict=True)
    ]
    np.testing.assert_allclose(ssim(*pair).numpy(), expected, rtol=1e-9)


def test_equal_pictures():
    picture = torch.rand(2, 3, 32, 32)
    assert psnr(picture, picture).tolist() == [math.inf, math.inf]
    assert ssim(picture, picture).tolist() == pytest.approx([1.0, 1.0])


def test_psnr_of_a_known_difference():
    assert psnr(torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.1)).item() == pytest.approx(20.0)


def test_ssim_is_symmetric(pair):
    torch.testing.assert_close(ssim(*pair), ssim(*reversed(pair)))


def test_relative_error():
    reference = torch.tensor([3.0, 4.0])
    assert relative_error(reference + torch.tensor([0.0, 0.5]), reference) == pytest.approx(0.1)
    assert relative_error(reference, reference) == 0.0
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(reference, torch.zeros(2)) == math.inf


def test_relative_error_does_not_lose_half_precision():
    big = torch.full((1000,), 300.0, dtype=torch.float16)  # squares overflow float16
    assert relative_error(big * 0.5, big) == pytest.approx(0.5)


@pytest.mark.parametrize("metric", [psnr, ssim, relative_error])
def test_different_shapes_are_refused(metric):
    with pytest.raises(InvalidOptionError, match="different shapes"):
        metric(torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 17))


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize("picture", [torch.zeros(3, 16, 16), torch.zeros(1, 3, 16, 16, dtype=torch.uint8)])
def test_what_is_no_batch_of_float_pictures_is_refused(metric, picture):
    with pytest.raises(InvalidOptionError, match="not pictures"):
        metric(picture, picture)


def test_pictures_smaller_than_the_window_are_refused():
    with pytest.raises(InvalidOptionError, match="too small"):
        ssim(torch.rand(1, 3, 10, 32), torch.rand(1, 3, 10, 32))
