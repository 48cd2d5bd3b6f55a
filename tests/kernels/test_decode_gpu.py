"""What the interpreter cannot show: bfloat16 and fp8 outputs, bfloat16 factors, whole FLUX layers on a real chip."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gossamer.formats import Packed, pack, unpack
from gossamer.kernels.decode import decode, decode_by, measure_row_scale
from gossamer.kernels.decode_geometry import WITH_TERMS, Geometry, gluon_terms
from gossamer.kernels.decode_reference import effective_weight, round_to, row_scales
from gossamer.kernels.decode_support import READABLE, has_fp8
from gossamer.kernels.low_rank import StackedTerms, stack_terms

pytestmark = pytest.mark.gpu
SHAPES = [(512, 3072), (37, 768)]


def packed_on_cpu(storage: str, rows: int, columns: int) -> Packed:
    return pack(torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02, storage)


def terms_on_gpu(rows: int, columns: int, *ranks: int, dtype: torch.dtype = torch.bfloat16) -> StackedTerms:
    generator = torch.Generator().manual_seed(1)
    factors = [(torch.randn(rows, r, generator=generator), torch.randn(r, columns, generator=generator)) for r in ranks]
    return stack_terms([((up * 0.05).to("cuda", dtype), (down * 0.05).to("cuda", dtype), 0.7) for up, down in factors])


def on_cpu(terms: StackedTerms) -> StackedTerms:
    return StackedTerms(terms.up.cpu(), terms.down.cpu(), terms.scale.cpu(), terms.ranks)


def poisoned(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((rows, columns), float("nan"), device="cuda").to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("storage", READABLE)
def test_floats_are_bit_for_bit_the_reference(storage, dtype, shape):
    packed, out = packed_on_cpu(storage, *shape), poisoned(*shape, dtype)
    decode(packed.to("cuda"), out)
    assert torch.equal(out.cpu(), unpack(packed, dtype))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("storage", READABLE)
def test_bytes_with_a_row_scale_are_the_reference(storage, dtype):
    if dtype == torch.float8_e4m3fn and not has_fp8(torch.device("cuda", 0)):
        pytest.skip("the chip has no fp8")
    packed, out, row_scale = packed_on_cpu(storage, 37, 768), poisoned(37, 768, dtype), torch.empty(37, device="cuda")
    measure_row_scale(packed.to("cuda"), row_scale, dtype, 768)
    weight = effective_weight(packed, 768)
    assert torch.equal(row_scale.cpu(), row_scales(weight, dtype))
    decode(packed.to("cuda"), out, None, row_scale)
    assert torch.equal(out.cpu().view(torch.uint8), round_to(weight, dtype, row_scale.cpu()).view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("storage", READABLE)
def test_low_rank_terms_in_every_type_of_factor(storage, dtype):
    packed, out = packed_on_cpu(storage, 130, 768), poisoned(130, 768, torch.float32)
    terms = terms_on_gpu(130, 768, 16, 4, 64, dtype=dtype)
    decode(packed.to("cuda"), out, terms)
    torch.testing.assert_close(out.cpu(), effective_weight(packed, 768, on_cpu(terms)), rtol=1e-5, atol=1e-6)


def geometries(storage: str) -> list[Geometry]:
    """Triton's own, Gluon's for an output of one byte and of two, and the transposed product."""
    short, long = (gluon_terms(storage, dtype) for dtype in (torch.float8_e4m3fn, torch.bfloat16))
    # lanes that look levels up lie side by side, so that a thread's further columns are 64 apart
    turned = [replace(g, cols=512, kept=64 if g.run == 8 else 0, down=4) for g in (short, long)]
    return [WITH_TERMS, short, long, replace(turned[0], rows=8), turned[1]]


@pytest.mark.parametrize("ranks", [(4,), (20,), (64,), (64, 64)])
@pytest.mark.parametrize("width", [768, 832])
@pytest.mark.parametrize("storage", READABLE)
def test_terms_in_every_geometry(storage, width, ranks):
    packed, terms = packed_on_cpu(storage, 45, 768), terms_on_gpu(45, width, *ranks)
    expected = effective_weight(packed, width, on_cpu(terms))
    for geometry in geometries(storage):
        out = poisoned(48, width, torch.float32)
        decode_by(geometry, packed.to("cuda"), out[:45], terms, None, 2)
        torch.testing.assert_close(out[:45].cpu(), expected, rtol=1e-5, atol=1e-6)
        assert out[45:].isnan().all()


@pytest.mark.parametrize("bands", [2, 3, 5])
@pytest.mark.parametrize("storage", ["int8", "nf4", "Q4_K", "Q8_0", "Q6_K"])
def test_bands_of_rows_have_factors_of_their_own_in_every_geometry(storage, bands):
    packed, whole = packed_on_cpu(storage, bands * 23, 768), terms_on_gpu(bands * 23, 768, 16)
    downs = torch.randn(bands * 16, 768, generator=torch.Generator().manual_seed(3)).to("cuda", torch.bfloat16)
    strengths = torch.linspace(0.25, 1.5, bands * 16, device="cuda")
    terms = StackedTerms(whole.up, downs, strengths, whole.ranks)
    expected = effective_weight(packed, 768, on_cpu(terms))
    for geometry in geometries(storage):
        out = poisoned(bands * 23, 768, torch.float32)
        decode_by(geometry, packed.to("cuda"), out, terms, None, 2)
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("storage", ["bf16", "fp8", "nf4", "Q4_K"])
def test_fp8_with_terms_stays_within_half_a_step(storage):
    if not has_fp8(torch.device("cuda", 0)):
        pytest.skip("the chip has no fp8")
    packed, terms = packed_on_cpu(storage, 130, 768), terms_on_gpu(130, 768, 16)
    out, row_scale = poisoned(130, 768, torch.float8_e4m3fn), torch.empty(130, device="cuda")
    measure_row_scale(packed.to("cuda"), row_scale, torch.float8_e4m3fn, 768, terms)
    decode(packed.to("cuda"), out, terms, row_scale)
    weight = effective_weight(packed, 768, on_cpu(terms))
    error = (out.float() * row_scale[:, None]).cpu() - weight
    # half a step is 2^-4 of the value among normal codes and 2^-10 units among subnormal ones
    allowed = torch.maximum(weight.abs() / 16, row_scale.cpu()[:, None] / 1024) * 1.001
    assert (error.abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_terms_without_strength_leave_every_bit(dtype):
    packed, out, terms = packed_on_cpu("Q4_K", 130, 768), poisoned(130, 768, torch.float32), terms_on_gpu(130, 768, 64)
    terms = StackedTerms(terms.up.to(dtype), terms.down.to(dtype), torch.zeros_like(terms.scale), terms.ranks)
    decode(packed.to("cuda"), out, terms)
    assert torch.equal(out.cpu(), unpack(packed, torch.float32))


@pytest.mark.parametrize("ranks", [(16,), (16, 16, 16, 16), (64, 64)])
@pytest.mark.parametrize("storage", ["nf4", "Q4_K", "Q8_0", "Q6_K"])
def test_the_widest_layer_of_flux_with_terms(storage, ranks):
    packed = pack(torch.randn(21504, 3072, device="cuda") * 0.02, storage)
    out, terms = poisoned(21504, 3072, torch.float32), terms_on_gpu(21504, 3072, *ranks)
    decode(packed, out, terms)
    torch.testing.assert_close(out, effective_weight(packed, 3072, terms), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("storage", ["nf4", "Q8_0", "Q6_K"])
def test_the_widest_layer_of_flux(storage):
    packed = pack(torch.randn(21504, 3072, device="cuda") * 0.02, storage)
    out = poisoned(21504, 3072, torch.bfloat16)
    decode(packed, out)
    assert torch.equal(out, unpack(packed, torch.bfloat16))
