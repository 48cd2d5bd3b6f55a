"""What the interpreter cannot show: bfloat16 and fp8 outputs, bfloat16 factors, whole FLUX layers on a real chip."""

from __future__ import annotations

import pytest
import torch

from gossamer.formats import Packed, pack, unpack
from gossamer.kernels.decode import decode, decode_by, measure_row_scale
from gossamer.kernels.decode_geometry import WITH_TERMS, Geometry, gluon_terms, warpgroup_terms
from gossamer.kernels.decode_reference import effective_weight, round_to, row_scales
from gossamer.kernels.decode_support import READABLE, has_fp8
from gossamer.kernels.low_rank import StackedTerms, powers, stack_terms

pytestmark = pytest.mark.gpu
SHAPES = [(512, 3072), (37, 768)]
WITH_MINIMUM = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")
HOPPER = (9, 0)


def packed_on_cpu(storage: str, rows: int, columns: int) -> Packed:
    return pack(torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02, storage)


def terms_on_gpu(rows: int, columns: int, *ranks: int, dtype: torch.dtype = torch.bfloat16) -> StackedTerms:
    generator = torch.Generator().manual_seed(1)
    factors = [(torch.randn(rows, r, generator=generator), torch.randn(r, columns, generator=generator)) for r in ranks]
    return stack_terms([((up * 0.05).to("cuda", dtype), (down * 0.05).to("cuda", dtype), 0.7) for up, down in factors])


def on_cpu(terms: StackedTerms) -> StackedTerms:
    return StackedTerms(terms.up.cpu(), terms.down.cpu(), terms.scale.cpu(), terms.power.cpu(), terms.ranks)


def in_float32(terms: StackedTerms) -> StackedTerms:
    return StackedTerms(terms.up.float(), terms.down.float(), terms.scale, terms.power, terms.ranks)


def poisoned(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((rows, columns), float("nan"), device="cuda").to(dtype)


def measured_scale(packed: Packed, dtype: torch.dtype, width: int, terms: StackedTerms | None = None) -> torch.Tensor:
    row_scale = torch.empty(packed.shape[0], device="cuda")
    measure_row_scale(packed.to("cuda"), row_scale, dtype, width, terms)
    return row_scale


def assert_half_a_step(
    out: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    packed: Packed,
    terms: StackedTerms | None = None,
) -> None:
    """fp8 codes are the nearest ones but for what float16 adds to the stored weight, and to `terms` and their sum.

    Half a step is 2^-4 of the value among normal codes and 2^-10 units among subnormal ones. float16 rounds the stored
    weight thrice, each time by 2^-11 at most, `up` once and the sum as often as tensor cores take up ranks; where a
    minimum is added, both summands are larger than their sum.
    """
    units, stored = row_scale.cpu()[:, None], effective_weight(packed, weight.shape[1])
    allowed = torch.maximum(weight.abs() / 16, units / 1024) * 1.001 + stored.abs() * 2**-9
    allowed += units / 2 if packed.format in WITH_MINIMUM else 0
    if terms is not None:
        parts = terms.up.abs().float() @ (terms.down.float() * terms.scale[:, None]).abs()
        allowed += parts.cpu() * 2**-10 * (1 + len(terms.scale) // 16)
    assert ((out.float().cpu() * units - weight).abs() <= allowed).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("storage", READABLE)
def test_floats_are_bit_for_bit_the_reference(storage, dtype, shape):
    packed, out = packed_on_cpu(storage, *shape), poisoned(*shape, dtype)
    decode(packed.to("cuda"), out)
    assert torch.equal(out.cpu(), unpack(packed, dtype))


@pytest.mark.parametrize("storage", READABLE)
def test_int8_with_a_row_scale_is_the_reference(storage):
    packed, out = packed_on_cpu(storage, 37, 768), poisoned(37, 768, torch.int8)
    weight, row_scale = effective_weight(packed, 768), measured_scale(packed, torch.int8, 768)
    assert torch.equal(row_scale.cpu(), row_scales(weight, torch.int8))
    decode(packed.to("cuda"), out, None, row_scale)
    assert torch.equal(out.cpu(), round_to(weight, torch.int8, row_scale.cpu()))


@pytest.mark.parametrize("shape", [*SHAPES, (70, 1536)])
@pytest.mark.parametrize("storage", READABLE)
def test_fp8_is_within_half_a_step_of_the_reference(storage, shape):
    skip_without_fp8()
    packed, out = packed_on_cpu(storage, *shape), poisoned(*shape, torch.float8_e4m3fn)
    weight, row_scale = effective_weight(packed, shape[1]), measured_scale(packed, torch.float8_e4m3fn, shape[1])
    assert torch.equal(row_scale.cpu(), row_scales(weight, torch.float8_e4m3fn))
    decode(packed.to("cuda"), out, None, row_scale)
    assert_half_a_step(out, row_scale, weight, packed)


def skip_without_fp8() -> None:
    if not has_fp8(torch.device("cuda", 0)):
        pytest.skip("the chip has no fp8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("storage", READABLE)
def test_low_rank_terms_in_every_type_of_factor(storage, dtype):
    packed, out = packed_on_cpu(storage, 130, 768), poisoned(130, 768, torch.float32)
    terms = terms_on_gpu(130, 768, 16, 4, 64, dtype=dtype)
    decode(packed.to("cuda"), out, terms)
    torch.testing.assert_close(out.cpu(), effective_weight(packed, 768, on_cpu(terms)), rtol=1e-5, atol=1e-6)


def geometries(storage: str, rank: int) -> list[Geometry]:
    """Triton's own, Gluon's for each type of output, and a warpgroup's."""
    if rank > 64:
        return [WITH_TERMS]
    bytes_and_words = (torch.float8_e4m3fn, torch.int8, torch.bfloat16)
    found = [WITH_TERMS, *(gluon_terms(storage, dtype, rank) for dtype in bytes_and_words)]
    return [*found, warpgroup_terms(storage)] if torch.cuda.get_device_capability() == HOPPER else found


def assert_half_a_step_in_every_geometry(packed: Packed, terms: StackedTerms) -> None:
    rows, width = packed.shape
    row_scale = measured_scale(packed, torch.float8_e4m3fn, width, terms)
    weight, exact = (effective_weight(packed, width, of) for of in (on_cpu(terms), in_float32(on_cpu(terms))))
    for geometry in geometries(packed.format, terms.up.shape[1]):
        out = poisoned(rows, width, torch.float8_e4m3fn)
        decode_by(geometry, packed.to("cuda"), out, terms, row_scale, 3)
        if geometry.run and not geometry.warpgroup:  # in float16, where nothing is rounded to the type of the factors
            assert_half_a_step(out, row_scale, exact, packed, terms)
        else:
            assert_half_a_step(out, row_scale, weight, packed)


@pytest.mark.parametrize("ranks", [(4,), (20,), (64,), (64, 64)])
@pytest.mark.parametrize("width", [768, 832])
@pytest.mark.parametrize("storage", READABLE)
def test_terms_in_every_geometry(storage, width, ranks):
    packed, terms = packed_on_cpu(storage, 45, 768), terms_on_gpu(45, width, *ranks)
    expected = effective_weight(packed, width, on_cpu(terms))
    for geometry in geometries(storage, terms.up.shape[1]):
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
    terms = StackedTerms(whole.up, downs, strengths, powers(downs), whole.ranks)
    expected = effective_weight(packed, 768, on_cpu(terms))
    for geometry in geometries(storage, 16):
        out = poisoned(bands * 23, 768, torch.float32)
        decode_by(geometry, packed.to("cuda"), out, terms, None, 2)
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranks", [(16,), (64,), (64, 64)])
@pytest.mark.parametrize("storage", READABLE)
def test_fp8_with_terms_is_within_half_a_step_in_every_geometry(storage, ranks):
    skip_without_fp8()
    packed, terms = packed_on_cpu(storage, 140, 768), terms_on_gpu(140, 768, *ranks)
    assert_half_a_step_in_every_geometry(packed, terms)


@pytest.mark.parametrize("factor", [2.0**-20, 1e-3, 1e4])
@pytest.mark.parametrize("storage", ["nf4", "Q4_K", "int8"])
def test_fp8_does_not_depend_on_which_factor_is_large(storage, factor):
    skip_without_fp8()
    packed, terms = packed_on_cpu(storage, 140, 768), terms_on_gpu(140, 768, 16)
    down = terms.down / factor
    terms = StackedTerms(terms.up * factor, down, terms.scale, powers(down), terms.ranks)
    assert_half_a_step_in_every_geometry(packed, terms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_terms_without_strength_leave_every_bit(dtype):
    packed, out, terms = packed_on_cpu("Q4_K", 130, 768), poisoned(130, 768, torch.float32), terms_on_gpu(130, 768, 64)
    factors, off = (terms.up.to(dtype), terms.down.to(dtype)), torch.zeros_like(terms.scale)
    terms = StackedTerms(*factors, off, terms.power, terms.ranks)
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
