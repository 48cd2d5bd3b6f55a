"""nf4 and fp4 against bitsandbytes on CPU: the same bytes in, the same floats out."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional as bnb
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.formats import Packed, four_bit, pack, packed_bytes, unpack
from gossamer.formats.dynamic_map import dynamic_map, pack_dynamic, unpack_dynamic
from gossamer.formats.four_bit import FP4_VALUES, NF4_VALUES

STORAGES = ("nf4", "fp4", "nf4-dq", "fp4-dq")


@pytest.fixture(autouse=True)
def eager():
    """bitsandbytes compiles its decoder for odd widths; the plain function gives the same numbers at once."""
    with torch.compiler.set_stance("force_eager"):
        yield


def theirs(weight: torch.Tensor, storage: str) -> tuple[torch.Tensor, bnb.QuantState]:
    kind, _, nested = storage.partition("-")
    return bnb.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=bool(nested))


def assert_same_bytes(packed: Packed, codes: torch.Tensor, state: bnb.QuantState) -> None:
    assert torch.equal(packed.tensors["codes"], codes.flatten())
    if not state.nested:
        assert torch.equal(packed.tensors["absmax"], state.absmax)
        return
    assert torch.equal(packed.tensors["absmax_codes"], state.absmax)
    assert torch.equal(packed.tensors["absmax_scale"], state.state2.absmax)
    assert torch.equal(packed.tensors["absmax_offset"], state.offset.reshape(1))
    assert torch.equal(dynamic_map(torch.device("cpu")), state.state2.code)


def as_one_line(codes: torch.Tensor, state: bnb.QuantState) -> torch.Tensor:
    """Decoded by bitsandbytes as one row of all values, which is how the bytes are laid out.

    With AVX-512 its 0.50.2 decoder restarts its blocks at each row of an even width such as 16, 48 or 80, although
    blocks run across rows: it then decodes its own bytes with a neighbour's absmax.
    """
    state.shape = torch.Size((1, state.shape.numel()))
    return bnb.dequantize_4bit(codes, state)


def assert_agrees(weight: torch.Tensor, storage: str) -> None:
    codes, state = theirs(weight, storage)
    packed = pack(weight, storage)
    assert_same_bytes(packed, codes, state)
    assert torch.equal(unpack(packed, weight.dtype), as_one_line(codes, state).reshape(weight.shape))
    assert packed.nbytes == packed_bytes(storage, *weight.shape)


def weight_of(rows: int, width: int, seed: int, magnitude: float = 0.02) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * magnitude


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_big_weight(storage, dtype):
    weight = weight_of(300, 1024, seed=1).to(dtype)
    assert_agrees(weight, storage)
    assert torch.equal(unpack(pack(weight, storage), dtype), bnb.dequantize_4bit(*theirs(weight, storage)))


@pytest.mark.parametrize("storage", STORAGES)
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 90),
    seed=st.integers(0, 2**31),
    magnitude=st.sampled_from([1e-44, 1e-39, 1e-38, 1e-30, 1e-4, 0.02, 1.0, 1e10, 1e30]),
    zeros=st.floats(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_and_magnitude(storage, rows, width, seed, magnitude, zeros):
    weight = weight_of(rows, width, seed, magnitude)
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed + 1)) < zeros] = 0
    assert_agrees(weight, storage)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", [(2, 64), (3, 21), (1, 1), (5, 13), (1, 65)])
def test_zeros_whole_and_in_part(storage, shape):
    assert_agrees(torch.zeros(shape), storage)
    weight = weight_of(*shape, seed=3)
    weight.view(-1)[: weight.numel() // 2] = 0
    assert_agrees(weight, storage)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("width", [64, 77])
def test_ties_between_two_codes(storage, sign, width):
    """Every midpoint exactly, and the floats on both sides of it, in a block whose absmax is a power of two."""
    values = torch.tensor(NF4_VALUES if storage.startswith("nf4") else FP4_VALUES).sort().values
    midpoints = (values[:-1] + values[1:]) / 2
    above, below = torch.nextafter(midpoints, torch.tensor(2.0)), torch.nextafter(midpoints, torch.tensor(-2.0))
    row = torch.cat((torch.tensor([sign]), midpoints, above, below))
    weight = torch.nn.functional.pad(row, (0, width - row.numel())).repeat(3, 1) * 0.5
    assert_agrees(weight, storage)


@pytest.mark.parametrize("storage", ["nf4-dq", "fp4-dq"])
def test_block_scales_whose_differences_are_subnormal(storage):
    """Some blocks lie on the mean: zero times an infinite reciprocal."""
    assert_agrees(torch.tensor([2.8e-45, 5.6e-45, 8.4e-45] * 9)[:, None].expand(27, 64).contiguous(), storage)


@pytest.mark.parametrize("storage", ["nf4-dq", "fp4-dq"])
def test_equal_blocks_leave_no_difference_to_store(storage):
    assert_agrees(torch.full((8, 64), 0.5), storage)


@pytest.mark.parametrize(("kind", "values"), [("nf4", NF4_VALUES), ("fp4", FP4_VALUES)])
def test_value_tables(kind, values):
    assert torch.equal(torch.tensor(values), bnb.get_4bit_type(kind, device="cpu"))


def test_the_dynamic_map():
    assert torch.equal(dynamic_map(torch.device("cpu")), bnb.create_dynamic_map())


@given(count=st.integers(1, 2000), seed=st.integers(0, 2**31), block=st.sampled_from([64, 256]))
@settings(max_examples=40, deadline=None)
def test_dynamic_blocks(count, seed, block):
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    codes, scale = pack_dynamic(values, block)
    their_codes, state = bnb.quantize_blockwise(values, blocksize=block)
    assert torch.equal(codes, their_codes)
    assert torch.equal(scale, state.absmax)
    assert torch.equal(unpack_dynamic(codes, scale, block), bnb.dequantize_blockwise(their_codes, state))


def test_double_quantisation_saves_three_eighths_of_a_bit_a_weight():
    plain, nested = (8 * packed_bytes(storage, 3072, 3072) / 3072**2 for storage in ("nf4", "nf4-dq"))
    assert plain == 4.5
    assert nested == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-5)


@pytest.fixture
def fresh_tables():
    """Tables are made on first use; forget them before and after, so that a test sees its own first use."""
    for table in (four_bit._byte_values, dynamic_map):
        table.cache_clear()
    yield
    for table in (four_bit._byte_values, dynamic_map):
        table.cache_clear()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.usefixtures("fresh_tables")
def test_first_use_inside_inference_mode_does_not_spoil_later_gradients(storage):
    with torch.inference_mode():
        unpack(pack(weight_of(4, 64, seed=5), storage), torch.float32)
    x = torch.randn(2, 64, requires_grad=True)
    (x @ unpack(pack(weight_of(4, 64, seed=5), storage), torch.float32).T).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.usefixtures("fresh_tables")
def test_first_use_under_another_default_type_makes_the_same_tables(storage):
    """Loaders of transformers and diffusers change torch's default type while they build a model."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        unpack(pack(weight_of(4, 64, seed=5).float(), storage), torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_agrees(weight_of(4, 64, seed=5), storage)
