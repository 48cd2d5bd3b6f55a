from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.formats import pack, packed_bytes, unpack


@given(rows=st.integers(1, 9), width=st.integers(1, 70), seed=st.integers(0, 2**31), exponent=st.integers(-30, 30))
@settings(max_examples=60, deadline=None)
def test_rounding_stays_within_half_a_step(rows, width, seed, exponent):
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    packed = pack(weight, "int8")
    step = packed.tensors["scale"][:, None]
    assert ((unpack(packed, torch.float32) - weight).abs() <= step * 0.5001).all()
    assert (packed.tensors["codes"].abs().amax(1) == 127).all()
    assert packed.nbytes == packed_bytes("int8", rows, width)


def test_whole_multiples_of_the_scale_come_back_exactly():
    codes = torch.arange(-127, 128, dtype=torch.float32)
    weight = torch.stack((codes * 0.25, codes.flip(0) * 2.0))
    packed = pack(weight, "int8")
    assert torch.equal(unpack(packed, torch.float32), weight)
    assert packed.tensors["codes"].min() == -127


def test_ties_go_to_even():
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert pack(weight, "int8").tensors["codes"].tolist() == [[127, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("tiny", [0.0, 1.4e-45, 1e-43, 2.6e-43])
def test_rows_of_zeros_and_subnormals_stay_finite(tiny):
    weight = torch.ones(2, 5)
    weight[0] = tiny
    values = unpack(pack(weight, "int8"), torch.float32)
    assert torch.isfinite(values).all()
    assert (values[0] - tiny).abs().max() <= tiny


def test_the_narrow_types_are_rounded_once():
    packed = pack(torch.randn(6, 33), "int8")
    exact = packed.tensors["codes"].float() * packed.tensors["scale"][:, None]
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(unpack(packed, dtype), exact.to(dtype))
