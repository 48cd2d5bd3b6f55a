"""The record of how like their references pictures are."""

import pytest
import torch

from gossamer.bench.likeness import likeness
from gossamer.bench.metrics import psnr


def test_equal_pictures_are_counted_and_kept_out_of_the_decibels():
    references = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.5
    pictures = references.clone()
    pictures[1:] += torch.tensor([0.001, 0.01, 0.1])[:, None, None, None]
    record = likeness(pictures, references)
    assert (record["pictures"], record["identical"]) == (4, 1)
    assert record["psnr_mean"] == pytest.approx(40.0, abs=1e-2)
    assert record["psnr_median"] == pytest.approx(40.0, abs=1e-2)
    assert record["psnr_min"] == pytest.approx(20.0, abs=1e-2)


def test_only_equal_pictures_have_no_decibels():
    pictures = torch.rand(2, 3, 16, 16)
    record = likeness(pictures, pictures)
    assert record["psnr_mean"] is record["psnr_median"] is record["psnr_min"] is None
    assert record["ssim_mean"] == pytest.approx(1.0)


def test_more_pictures_than_are_compared_at_a_time():
    generator = torch.Generator().manual_seed(1)
    one, two = (torch.rand(53, 3, 12, 12, generator=generator) for _ in range(2))
    assert likeness(one, two)["psnr_mean"] == pytest.approx(float(psnr(one, two).mean()))
