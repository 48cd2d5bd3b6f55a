"""The decode kernels against the formats' own unpacking and the torch reference: odd shapes, poisoned outputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from gossamer.errors import GossamerError
from gossamer.formats import Packed, pack, storage_names, unpack
from gossamer.kernels import decode as decode_module
from gossamer.kernels import decode_ops
from gossamer.kernels.decode import decode, decode_by, measure_row_scale
from gossamer.kernels.decode_geometry import (
    STORED_ONLY,
    WITH_TERMS,
    Geometry,
    chosen_geometry,
    gluon_terms,
    warpgroup_terms,
)
from gossamer.kernels.decode_reference import (
    decode_in_torch,
    effective_weight,
    measure_row_scale_in_torch,
    row_scales,
)
from gossamer.kernels.decode_support import READABLE, decodable, why_not_decodable
from gossamer.kernels.low_rank import StackedTerms, delta, powers, set_scales, stack_terms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# float32 sums in another order, or three TF32 products
SUMS = {"rtol": 1e-5, "atol": 1e-6}
few = settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
rows_and_blocks = st.tuples(st.integers(1, 2 * STORED_ONLY.rows + 3), st.integers(1, 5))


def weight_of(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02).to(DEVICE)


def shape_for(storage: str, size: tuple[int, int]) -> tuple[int, int]:
    """Rows, and that many blocks; formats without blocks get odd widths around a tile's."""
    multiple = READABLE[storage].width_multiple
    return size[0], size[1] * (multiple if multiple > 1 else 171)


def poisoned(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((rows, columns), float("nan"), dtype=dtype, device=DEVICE)


def terms_of(rows: int, columns: int, *ranks: int, dtype: torch.dtype = torch.float32) -> StackedTerms:
    generator = torch.Generator().manual_seed(1)
    parts = []
    for index, rank in enumerate(ranks):
        up = torch.randn(rows, rank, generator=generator) * 0.1
        down = torch.randn(rank, columns, generator=generator) * 0.1
        parts.append((up.to(DEVICE, dtype), down.to(DEVICE, dtype), 0.5 - 1.25 * index))
    return stack_terms(parts)


def random_bytes(storage: str, rows: int, columns: int) -> Packed:
    """Any bytes at all as a weight: codes and scales that packing never writes, infinite and NaN ones included."""
    packed = pack(weight_of(rows, columns), storage)
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for role, tensor in packed.tensors.items():
        noise = torch.randint(0, 256, tensor.view(torch.uint8).shape, dtype=torch.uint8, generator=generator)
        codes = tensor.element_size() == 1 or role == "values"
        tensors[role] = noise.to(DEVICE).view(tensor.dtype).view(tensor.shape) if codes else tensor
    return Packed(storage, tensors, packed.shape)


@pytest.mark.parametrize("storage", READABLE)
@few
@given(size=rows_and_blocks)
def test_float32_is_bit_for_bit_the_reference(storage, size):
    shape = shape_for(storage, size)
    packed, out = pack(weight_of(*shape), storage), poisoned(*shape)
    decode(packed, out)
    assert torch.equal(out, unpack(packed, torch.float32))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("storage", READABLE)
def test_any_bytes_decode_as_the_reference_does(storage):
    shape = shape_for(storage, (5, 4))
    packed, out = random_bytes(storage, *shape), torch.zeros(shape, device=DEVICE)
    decode(packed, out)
    torch.testing.assert_close(out, unpack(packed, torch.float32), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("storage", READABLE)
def test_float16_is_rounded_once_and_neighbours_in_the_buffer_stay(storage):
    rows, columns = shape_for(storage, (9, 3))
    packed = pack(weight_of(rows, columns), storage)
    buffer = poisoned(rows + 4, columns, torch.float16)
    decode(packed, buffer[1 : rows + 1])
    assert torch.equal(buffer[1 : rows + 1], unpack(packed, torch.float16))
    assert buffer[:1].isnan().all()
    assert buffer[rows + 1 :].isnan().all()


def test_a_matrix_that_tiles_divide_is_decoded_without_masks():
    shape = (2 * STORED_ONLY.rows, 2 * STORED_ONLY.cols)
    for storage in READABLE:
        packed, out = pack(weight_of(*shape), storage), poisoned(*shape)
        decode(packed, out)
        assert torch.equal(out, unpack(packed, torch.float32)), storage


def test_columns_of_a_wider_buffer_can_be_the_output():
    packed, buffer = pack(weight_of(5, 256), "Q4_K"), poisoned(5, 300)
    decode(packed, buffer[:, :256])
    assert torch.equal(buffer[:, :256], unpack(packed, torch.float32))
    assert buffer[:, 256:].isnan().all()


# low-rank terms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", READABLE)
def test_low_rank_terms_are_added_in_float32(storage):
    shape = shape_for(storage, (WITH_TERMS.rows + 3, 2))
    packed, out, terms = pack(weight_of(*shape), storage), poisoned(*shape), terms_of(*shape, 4, 16, 7)
    decode(packed, out, terms)
    torch.testing.assert_close(out, effective_weight(packed, shape[1], terms), **SUMS)
    assert not torch.allclose(out, unpack(packed, torch.float32), atol=1e-3)


@settings(max_examples=8, deadline=None)
@given(rows=st.integers(1, 70), columns=st.integers(1, 200), ranks=st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_any_number_of_terms_of_any_rank(rows, columns, ranks):
    packed, out, terms = pack(weight_of(rows, columns), "fp8"), poisoned(rows, columns), terms_of(rows, columns, *ranks)
    decode(packed, out, terms)
    torch.testing.assert_close(out, effective_weight(packed, columns, terms), **SUMS)


def test_half_precision_factors_are_summed_in_float32():
    packed, out, terms = pack(weight_of(6, 320), "nf4"), poisoned(6, 320), terms_of(6, 320, 8, 20, dtype=torch.float16)
    assert terms.up.dtype == torch.float16
    decode(packed, out, terms)
    torch.testing.assert_close(out, unpack(packed, torch.float32) + delta(terms), **SUMS)


@pytest.mark.parametrize("tiles", [1, 2, 3])
@pytest.mark.parametrize("ranks", [(), (4,), (16, 60)])
def test_a_program_goes_down_several_tiles_and_stops_at_the_last_row(tiles, ranks):
    shape = (45, 300)
    packed, out = pack(weight_of(*shape), "fp8"), poisoned(48, 300)
    terms = terms_of(*shape, *ranks) if ranks else None
    decode_by(Geometry(16, 128, 4, stages=2), packed, out[:45], terms, None, tiles)
    torch.testing.assert_close(out[:45], effective_weight(packed, 300, terms), **SUMS)
    assert out[45:].isnan().all()


@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("ranks", [(4,), (16, 60)])
def test_each_band_of_rows_meets_its_own_factors(ranks, tiles):
    bands, rows, columns = 3, 3 * 21, 300
    packed, out, whole = pack(weight_of(rows, columns), "fp8"), poisoned(rows, columns), terms_of(rows, columns, *ranks)
    rank = whole.up.shape[1]
    downs, strengths = weight_of(bands * rank, columns, seed=3), torch.linspace(0.5, 2.0, bands * rank, device=DEVICE)
    terms = StackedTerms(whole.up, downs, strengths, powers(downs), whole.ranks)
    decode_by(Geometry(16, 128, 4), packed, out, terms, None, tiles)
    expected = unpack(packed, torch.float32)
    for band in range(bands):
        own, factors = slice(band * 21, (band + 1) * 21), slice(band * rank, (band + 1) * rank)
        expected[own] += whole.up[own] @ (strengths[factors, None] * downs[factors])
    torch.testing.assert_close(out, expected, **SUMS)
    scale = torch.empty(rows, device=DEVICE)
    measure_row_scale(packed, scale, torch.int8, columns, terms)
    torch.testing.assert_close(scale, row_scales(expected, torch.int8), **SUMS)


def test_a_layer_is_cut_into_about_as_many_programs_as_asked_for(monkeypatch):
    monkeypatch.setattr(decode_module, "_multiprocessors", lambda device: 132)
    layout = decode_module._Layout("nf4", (21504, 3072), 3072, torch.device("cpu"))
    for programs, tiles in ((None, 1), (1, 68), (4, 16), (8, 8), (1000, 1)):
        assert decode_module._tiles_each(layout, Geometry(64, 128, 4, programs=programs)) == tiles
    decode_module._tiles_each.cache_clear()


@pytest.mark.parametrize(
    ("storage", "dtype", "rank", "hopper", "expected"),
    [
        ("nf4", torch.bfloat16, 0, True, STORED_ONLY),
        ("bf16", torch.float8_e4m3fn, 16, True, WITH_TERMS),
        ("nf4", torch.float8_e4m3fn, 32, False, gluon_terms("nf4", torch.float8_e4m3fn, 32)),
        ("nf4", torch.float8_e4m3fn, 64, False, WITH_TERMS),
        ("nf4", torch.float8_e4m3fn, 64, True, warpgroup_terms("nf4")),
        ("nf4", torch.bfloat16, 64, True, WITH_TERMS),
        ("nf4", torch.float8_e4m3fn, 128, True, WITH_TERMS),
        ("Q8_0", torch.bfloat16, 16, True, WITH_TERMS),
        ("Q8_0", torch.int8, 16, False, WITH_TERMS),
    ],
)
def test_the_geometry_follows_from_format_output_ranks_and_chip(storage, dtype, rank, hopper, expected):
    assert chosen_geometry(storage, dtype, rank, hopper) == expected


def test_scales_change_in_place():
    packed, out, terms = pack(weight_of(6, 128), "Q8_0"), poisoned(6, 128), terms_of(6, 128, 3, 5)
    set_scales(terms, [0.0, 0.0])
    decode(packed, out, terms)
    assert torch.equal(out, unpack(packed, torch.float32))
    set_scales(terms, [2.0, 0.0])
    decode(packed, out, terms)
    expected = unpack(packed, torch.float32) + 2.0 * terms.up[:, :3] @ terms.down[:3]
    torch.testing.assert_close(out, expected, **SUMS)


@pytest.mark.parametrize("storage", ["fp32", "fp8", "int8", "nf4", "nf4-dq", "Q8_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("extra", [64, 300])
def test_a_widened_layer_has_zero_columns_beyond_its_base(storage, extra):
    packed, out = pack(weight_of(5, 256), storage), poisoned(5, 256 + extra)
    decode(packed, out)
    assert torch.equal(out[:, :256], unpack(packed, torch.float32))
    assert (out[:, 256:] == 0).all()
    terms = terms_of(5, 256 + extra, 4)
    decode(packed, out, terms)
    torch.testing.assert_close(out, effective_weight(packed, 256 + extra, terms), **SUMS)


# row scales -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", READABLE)
def test_int8_with_row_scale_is_the_reference(storage):
    shape = shape_for(storage, (7, 2))
    packed = pack(weight_of(*shape), storage)
    row_scale, expected_scale = poisoned(2, shape[0])
    measure_row_scale(packed, row_scale, torch.int8, shape[1])
    measure_row_scale_in_torch(packed, expected_scale, torch.int8, shape[1])
    assert torch.equal(row_scale, expected_scale)
    out, expected = torch.full((2, *shape), 99, dtype=torch.int8, device=DEVICE)
    decode(packed, out, None, row_scale)
    decode_in_torch(packed, expected, None, row_scale)
    assert torch.equal(out, expected)
    assert (out.abs().amax(dim=1) == 127).all()


@pytest.mark.parametrize("storage", ["int8", "nf4", "Q4_K", "Q6_K"])
def test_int8_with_low_rank_terms_stays_within_half_a_step(storage):
    packed, terms = pack(weight_of(20, 256), storage), terms_of(20, 256, 4, 9)
    row_scale = poisoned(1, 20)[0]
    measure_row_scale(packed, row_scale, torch.int8, 256, terms)
    weight = effective_weight(packed, 256, terms)
    torch.testing.assert_close(row_scale, row_scales(weight, torch.int8), rtol=1e-6, atol=0)
    out = torch.full((20, 256), 99, dtype=torch.int8, device=DEVICE)
    decode(packed, out, terms, row_scale)
    assert ((out.float() * row_scale[:, None] - weight).abs() <= 0.5001 * row_scale[:, None]).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@few
@given(rows=st.integers(1, 21), columns=st.integers(1, 600))
def test_row_scales_are_those_of_the_reference(dtype, rows, columns):
    packed, row_scale = pack(weight_of(rows, columns), "fp32"), poisoned(1, rows)[0]
    measure_row_scale(packed, row_scale, dtype, columns)
    assert torch.equal(row_scale, row_scales(packed.tensors["values"], dtype))


def test_rows_too_small_for_a_scale_get_one_and_become_zeros():
    weight = weight_of(3, 64)
    weight[0], weight[1] = 0.0, 1e-40
    packed, row_scale = pack(weight, "fp32"), poisoned(1, 3)[0]
    measure_row_scale(packed, row_scale, torch.int8, 64)
    out = torch.full((3, 64), 99, dtype=torch.int8, device=DEVICE)
    decode(packed, out, None, row_scale)
    assert row_scale[:2].tolist() == [1.0, 1.0]
    assert (out[:2] == 0).all()
    assert out[2].any()


def test_a_stale_row_scale_saturates():
    packed = pack(weight_of(3, 64), "fp32")
    out = torch.zeros((3, 64), dtype=torch.int8, device=DEVICE)
    decode(packed, out, None, torch.full((3,), 1e-4, device=DEVICE))
    expected = (packed.tensors["values"] * 1e4).round().clamp(-127, 127)
    assert torch.equal(out.float(), expected)
    assert set(out.flatten().tolist()) >= {-127, 127}


# operators ------------------------------------------------------------------------------------------------------------


def counted(monkeypatch) -> list[str]:
    """The operators that are called, by name."""
    calls: list[str] = []
    for name in ("_decode", "_row_scale"):
        monkeypatch.setattr(decode_ops, name, lambda *_, name=name: calls.append(name))
    return calls


def test_a_call_that_nothing_watches_goes_past_the_operators(monkeypatch):
    calls, packed, out = counted(monkeypatch), pack(weight_of(6, 256), "Q4_K"), poisoned(6, 256)
    row_scale = poisoned(1, 6)[0]
    with torch.inference_mode():
        decode_ops.decode_into(packed, out, "triton")
        decode_ops.measure_row_scale_into(packed, row_scale, torch.int8, 256, "triton")
    assert torch.equal(out, unpack(packed, torch.float32))
    assert torch.equal(row_scale, row_scales(out, torch.int8))
    assert not calls


def test_autograd_and_tracers_see_the_operators(monkeypatch):
    calls, packed, out = counted(monkeypatch), pack(weight_of(6, 256), "Q4_K"), poisoned(6, 256)
    decode_ops.decode_into(packed, out, "triton")
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        decode_ops.measure_row_scale_into(packed, out[:, 0], torch.int8, 256, "triton")
    assert calls == ["_decode", "_row_scale"]


def _step(packed: Packed, terms: StackedTerms, x: torch.Tensor, backend: decode_ops.Backend) -> torch.Tensor:
    out = torch.empty(packed.shape, device=x.device)
    decode_ops.decode_into(packed, out, backend, terms)
    row_scale = torch.empty(packed.shape[0], device=x.device)
    decode_ops.measure_row_scale_into(packed, row_scale, torch.int8, packed.shape[1], backend, terms)
    return x @ out.T + row_scale


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_full_graph_takes_the_operators_as_they_are(backend, grad):
    packed, terms, x = pack(weight_of(6, 256), "Q4_K"), terms_of(6, 256, 4), weight_of(3, 256)
    weight = effective_weight(packed, 256, terms)
    with torch.set_grad_enabled(grad):
        y = torch.compile(_step, fullgraph=True, backend="aot_eager")(packed, terms, x, backend)
    torch.testing.assert_close(y, x @ weight.T + row_scales(weight, torch.int8), **SUMS)


# refusals -------------------------------------------------------------------------------------------------------------


def test_every_storage_format_decodes_or_says_why():
    assert set(READABLE) <= set(storage_names())
    for storage in set(storage_names()) - set(READABLE):
        assert storage in why_not_decodable(storage, 256)
        assert storage.startswith(("IQ1", "IQ2", "IQ3", "TQ", "MXFP4", "NVFP4")), f"{storage} occurs in FLUX files"
    assert "IQ2_XS" in why_not_decodable("IQ2_XS", 256)
    assert "blocks of 64" in why_not_decodable("nf4", 96)
    assert decodable("nf4", 128)
    assert not decodable("nf4", 96)


def refuses(packed: Packed, out: torch.Tensor, *rest, match: str) -> None:
    with pytest.raises(GossamerError, match=match):
        decode(packed, out, *rest)


def test_outputs_that_do_not_fit_are_refused():
    packed = pack(weight_of(4, 256), "fp8")
    row_scale = torch.ones(4, device=DEVICE)
    refuses(packed, poisoned(5, 256), match="shape")
    refuses(packed, poisoned(4, 255), match="255 columns")
    refuses(packed, poisoned(256, 4).T, match="side by side")
    refuses(packed, poisoned(4, 256, torch.float64), match="float64")
    refuses(packed, poisoned(4, 256), None, row_scale, match="takes no row scale")
    refuses(packed, torch.zeros(4, 256, dtype=torch.int8, device=DEVICE), match="lacks row scale")
    refuses(packed, torch.zeros(4, 256, dtype=torch.int8, device=DEVICE), None, row_scale[:3], match="4 rows")
    refuses(packed, poisoned(4, 256), terms_of(4, 200, 2), match="low-rank")


def test_tensors_on_two_devices_and_scales_of_floats_are_refused():
    packed = pack(weight_of(4, 256), "fp8")
    refuses(packed, torch.empty(4, 256, device="meta"), match="across devices")
    with pytest.raises(GossamerError, match="no row scale for"):
        measure_row_scale(packed, torch.ones(4, device=DEVICE), torch.bfloat16, 256)


def test_bytes_that_the_kernels_cannot_read_are_refused():
    refuses(pack(weight_of(2, 96), "nf4"), poisoned(2, 96), match="blocks of 64")
    packed = pack(weight_of(2, 256), "Q4_K")
    blocks = torch.zeros(packed.nbytes + 1, dtype=torch.uint8, device=DEVICE)[1:].view(2, -1)
    refuses(Packed("Q4_K", {"blocks": blocks}, (2, 256)), poisoned(2, 256), match="multiples of eight")
    wide = torch.zeros(2, 512, device=DEVICE)[:, ::2]
    refuses(Packed("fp32", {"values": wide}, (2, 256)), poisoned(2, 256), match="contiguous")
