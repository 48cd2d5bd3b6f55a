"""Stored weights as float16 in units of their row, on the way to fp8: the arithmetic, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from gossamer.formats import pack, unpack
from gossamer.kernels import decode as decoding
from gossamer.kernels.decode_kernel import in_halves
from gossamer.kernels.decode_reference import row_scales
from gossamer.kernels.decode_support import READABLE
from gossamer.kernels.low_rank import delta, stack_terms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WITH_MINIMUM = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")
# plain values are no codes; e4m3 needs a chip that has the type
STORAGES = [name for name, known in READABLE.items() if known.family not in ("plain", "fp8")]


@pytest.fixture
def float16_for_fp8(monkeypatch):
    """The kernel as for fp8 outputs, but float16 is written: the interpreter gets the last rounding wrong."""
    monkeypatch.setitem(decoding.OUTPUTS, torch.float16, "fp8")
    monkeypatch.setattr(decoding, "_require_output", lambda *_: None)


@pytest.mark.parametrize("rank", [0, 20, 70])
@pytest.mark.parametrize("width", [768, 1280])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_weight_in_units_of_its_row_is_right_to_eleven_bits(storage, width, rank, float16_for_fp8):
    assert in_halves("fp8", READABLE[storage].family)
    rows, generator = 16, torch.Generator().manual_seed(width)
    packed = pack((torch.randn(rows, width, generator=generator) * 0.02).to(DEVICE), storage)
    factors = [(torch.randn(size, generator=generator) * 0.05).to(DEVICE) for size in ((rows, rank), (rank, width))]
    terms = stack_terms([(*factors, 0.7)]) if rank else None
    stored = unpack(packed, torch.float32)
    weight = stored + delta(terms) if terms else stored
    units = row_scales(weight, torch.float8_e4m3fn)
    out = torch.full((rows, width), float("nan"), dtype=torch.float16, device=DEVICE)
    decoding.decode(packed, out, terms, units)
    # scale, code and product are rounded by 2^-11 each; a minimum and what it is added to are up to 900 units large
    allowed = (stored / units[:, None]).abs() * 2**-9 + (0.5 if storage in WITH_MINIMUM else 1e-6)
    # what terms make of it is rounded once more where it is written
    expected = weight / units[:, None]
    allowed += expected.abs() * 2**-11 if terms else 0
    assert ((out.float() - expected).abs() <= allowed).all()
