from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.formats import pack, packed_bytes, unpack

# dtype of the codes, largest finite code, worst relative rounding of a normal code (half a step of its fraction)
CASES = {"fp8": (torch.float8_e4m3fn, 448.0, 2**-4), "fp8_e5m2": (torch.float8_e5m2, 57344.0, 2**-3)}


@pytest.mark.parametrize("storage", CASES)
def test_a_rows_largest_value_lands_on_the_largest_code(storage):
    dtype, largest, _ = CASES[storage]
    weight = torch.randn(16, 64) * torch.logspace(-6, 6, 16)[:, None]
    packed = pack(weight, storage)
    assert packed.tensors["codes"].dtype == dtype
    assert torch.equal(packed.tensors["codes"].float().abs().amax(1), torch.full((16,), largest))
    assert torch.equal(packed.tensors["scale"], weight.abs().amax(1) / largest)


@pytest.mark.parametrize("storage", CASES)
@given(rows=st.integers(1, 9), width=st.integers(1, 70), seed=st.integers(0, 2**31), exponent=st.integers(-30, 30))
@settings(max_examples=40, deadline=None)
def test_rounding_stays_within_half_a_step(storage, rows, width, seed, exponent):
    dtype, _, worst = CASES[storage]
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    packed = pack(weight, storage)
    error = (unpack(packed, torch.float64) - weight).abs()
    # below the smallest normal code the step is constant: half of it, plus float32 rounding of the quotient
    floor = packed.tensors["scale"][:, None].double() * torch.finfo(dtype).tiny * worst
    assert (error <= weight.abs() * worst * 1.0001 + floor * 1.0001).all()
    assert packed.nbytes == packed_bytes(storage, rows, width)


@pytest.mark.parametrize("storage", CASES)
def test_the_formula(storage):
    packed = pack(torch.randn(5, 40), storage)
    expected = packed.tensors["codes"].float() * packed.tensors["scale"][:, None]
    assert torch.equal(unpack(packed, torch.float32), expected)
    assert torch.equal(unpack(packed, torch.bfloat16), expected.bfloat16())


@pytest.mark.parametrize("storage", CASES)
@pytest.mark.parametrize("tiny", [0.0, 1.4e-45, 1e-43, 9e-43, 1.2e-40, 1e-38])
def test_rows_of_zeros_and_subnormals_stay_finite(storage, tiny):
    weight = torch.randn(3, 8)
    weight[1] = tiny
    values = unpack(pack(weight, storage), torch.float32)
    assert torch.isfinite(values).all()
    assert (values[1] - tiny).abs().max() <= tiny


def test_the_scale_is_what_makes_small_weights_fit():
    weight = torch.randn(64, 256) * 0.02
    unscaled = weight.to(torch.float8_e4m3fn).float()
    scaled = unpack(pack(weight, "fp8"), torch.float32)
    assert (scaled - weight).norm() < (unscaled - weight).norm()
