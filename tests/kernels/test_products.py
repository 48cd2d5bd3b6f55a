import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.errors import UnsupportedShapeError
from gossamer.formats import pack, unpack
from gossamer.kernels.products import (
    INT8_WIDEST,
    SCALED_PRODUCTS,
    matmul,
    matmul_gelu,
    matmul_int8,
    matmul_parts,
    scaled_matmul_fp8,
    scaled_matmul_fp8_tensorwise,
    scaled_matmul_reference,
    shape_obstacle,
)

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ("cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU]))
# torch 2.13 is the oldest that was seen to take row scales on a CPU, where nothing but these tests asks for them
NO_ROW_SCALES = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13)
FP8_PRODUCTS = (scaled_matmul_fp8, scaled_matmul_fp8_tensorwise)
# Roundings after the sum, in units of half a last place: one, and three more where bf16 lies between.
ROUNDINGS = {scaled_matmul_fp8: 1, scaled_matmul_fp8_tensorwise: 4, matmul_int8: 1}


def skip_row_scales(product, device: str) -> None:
    if product is scaled_matmul_fp8 and device == "cpu" and NO_ROW_SCALES:
        pytest.skip("this torch takes no row scales on a CPU")


def operands(rows: int, width: int, out: int, storage: str, device: str, seed: int = 0) -> list[torch.Tensor]:
    """x, x_scale, weight, weight_scale as a row-quantising kernel would write them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for count, spread in ((rows, 3.0), (out, 0.02)):
        packed = pack(torch.randn(count, width, generator=generator) * spread, storage)
        tensors += [packed.tensors["codes"].to(device), packed.tensors["scale"].to(device)]
    return tensors


def bound(scaled: list[torch.Tensor], bias: torch.Tensor | None, dtype: torch.dtype, roundings: int) -> torch.Tensor:
    """The largest error of `roundings` roundings to `dtype` and of a sum in float32 in any order, for each element."""
    x, x_scale, weight, weight_scale = (tensor.double() for tensor in scaled)
    magnitude = (x.abs() @ weight.abs().t()) * x_scale[:, None] * weight_scale
    exact = scaled_matmul_reference(*scaled, bias, torch.float32).double().abs()
    unbiased = scaled_matmul_reference(*scaled, None, torch.float32).double().abs()
    half_place = torch.finfo(dtype).eps / 2
    return torch.maximum(exact, unbiased) * half_place * roundings * 1.01 + magnitude * 2e-6


# plain products -------------------------------------------------------------------------------------------------------


def plain_operands(shape, out, spread, device, dtype, with_bias, seed):
    """x of a shape, a weight (out, in) and a bias or None, and their product in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator).to(device, dtype)
    weight = (torch.randn(out, shape[-1], generator=generator) * spread).to(device, dtype)
    bias = torch.randn(out, generator=generator).to(device, dtype) if with_bias else None
    return x, weight, bias, x.double() @ weight.double().t() + (0 if bias is None else bias.double())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_matmul_is_the_same_into_a_given_buffer(device, dtype, with_bias):
    x, weight, bias, exact = plain_operands((2, 5, 24), 7, 1, device, dtype, with_bias, 1)
    out = torch.full((2, 5, 7), torch.nan, dtype=dtype, device=device)
    assert matmul(x, weight, bias, out) is out
    for result in (out, matmul(x, weight, bias)):
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), exact, rtol=0, atol=40 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_matmul_gelu_is_the_tanh_form_of_a_product(device, dtype, with_bias):
    """5e-4 lie between the two forms, which float32 tells apart."""
    x, weight, bias, summed = plain_operands((2, 64, 128), 96, 0.1, device, dtype, with_bias, 3)
    exact = torch.nn.functional.gelu(summed, approximate="tanh")
    result, eps = matmul_gelu(x, weight, bias), torch.finfo(dtype).eps
    assert (result.dtype, result.shape) == (dtype, (2, 64, 96))
    torch.testing.assert_close(result.double(), exact, rtol=4 * eps, atol=100 * eps)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_parts_are_multiplied_as_if_they_lay_side_by_side(device, dtype, with_bias):
    whole, weight, bias, exact = plain_operands((2, 5, 40), 7, 1, device, dtype, with_bias, 4)
    parts = [part.contiguous() for part in whole.split([8, 24, 8], dim=2)]
    result = matmul_parts(parts, weight, bias)
    assert (result.dtype, result.shape) == (dtype, (2, 5, 7))
    # a rounding a part, of sums up to 25
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=3 * 25 * torch.finfo(dtype).eps)


def test_matmul_into_rows_of_a_larger_buffer():
    x, weight, bias = torch.randn(1, 4, 16), torch.randn(8, 16), torch.randn(8)
    buffer = torch.full((1, 10, 8), torch.nan)
    matmul(x, weight, bias, buffer[:, 3:7])
    torch.testing.assert_close(buffer[:, 3:7], torch.nn.functional.linear(x, weight, bias))
    assert buffer[:, :3].isnan().all()
    assert buffer[:, 7:].isnan().all()


def test_matmul_refuses_a_buffer_whose_rows_are_scattered():
    with pytest.raises(RuntimeError, match="view"):
        matmul(torch.randn(2, 4, 16), torch.randn(8, 16), None, torch.empty(2, 10, 8)[:, 3:7])


# scaled products ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(37, 64, 48), (5, 3088, 32), (300, 3088, 32)], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("product", FP8_PRODUCTS, ids=lambda product: product.__name__)
def test_fp8_products_against_the_reference(product, with_bias, out_dtype, shape, device):
    skip_row_scales(product, device)
    scaled = operands(*shape, "fp8", device)
    bias = torch.linspace(-2, 2, shape[2], device=device).to(out_dtype) if with_bias else None
    result = product(*scaled, bias, out_dtype)
    expected = scaled_matmul_reference(*scaled, bias, torch.float32)
    assert result.dtype == out_dtype
    assert result.shape == (shape[0], shape[2])
    # Hopper cuts the running sum to about 14 bits after each 32 products (DeepSeek-V3 report, section 3.3.2)
    loose = -(-shape[1] // 32) * 2.0**-13 * expected.abs().max().item() if device == "cuda" else 0.0
    assert (
        (result.double() - expected.double()).abs() <= bound(scaled, bias, out_dtype, ROUNDINGS[product]) + loose
    ).all()


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=20)
@given(
    rows=st.integers(1, 70),
    width=st.integers(1, 12).map(lambda count: 8 * count),
    out=st.integers(1, 12).map(lambda count: 8 * count),
    out_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    with_bias=st.booleans(),
)
def test_int8_product_against_the_reference(device, rows, width, out, out_dtype, with_bias):
    scaled = operands(rows, width, out, "int8", device, seed=rows)
    bias = torch.linspace(-2, 2, out, device=device).to(out_dtype) if with_bias else None
    result = matmul_int8(*scaled, bias, out_dtype)
    assert result.shape == (rows, out)
    assert result.dtype == out_dtype
    expected = scaled_matmul_reference(*scaled, bias, torch.float32)
    assert ((result.double() - expected.double()).abs() <= bound(scaled, bias, out_dtype, ROUNDINGS[matmul_int8])).all()


def test_the_reference_is_the_product_of_the_unpacked_weights():
    weight = pack(torch.randn(16, 32, generator=torch.Generator().manual_seed(2)), "fp8")
    x = pack(torch.randn(5, 32, generator=torch.Generator().manual_seed(3)), "fp8")
    codes = [x.tensors["codes"], x.tensors["scale"], weight.tensors["codes"], weight.tensors["scale"]]
    expected = unpack(x, torch.float32) @ unpack(weight, torch.float32).t()
    torch.testing.assert_close(scaled_matmul_reference(*codes, None, torch.float32), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 16, 17, 33])
def test_int8_sums_are_exact_at_every_number_of_rows(rows, device):
    """Unit scales and small codes: every sum is a whole number that float32 holds."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randint(-9, 10, (rows, 40), dtype=torch.int8, generator=generator).to(device)
    weight = torch.randint(-9, 10, (24, 40), dtype=torch.int8, generator=generator).to(device)
    ones = [torch.ones(count, device=device) for count in (rows, 24)]
    result = matmul_int8(x, ones[0], weight, ones[1], None, torch.float32)
    assert torch.equal(result.cpu().long(), x.cpu().long() @ weight.cpu().long().t())


@pytest.mark.parametrize(("rows", "width", "seen"), [(256, 3088, 272), (272, 3088, 272), (256, 3072, 256)])
def test_few_wide_rows_reach_the_library_as_more(rows, width, seen, monkeypatch):
    """cuBLAS has no kernel for them on Hopper; what comes back has the rows that were asked for."""
    shapes = []

    def record(x, weight, *, scale_a, scale_b, bias, out_dtype, use_fast_accum):
        shapes.append((tuple(x.shape), tuple(scale_a.shape)))
        return torch.zeros(x.shape[0], weight.shape[1], dtype=out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", record)
    result = scaled_matmul_fp8(*operands(rows, width, 16, "fp8", "cpu"), None, torch.bfloat16)
    assert shapes == [((seen, width), (seen, 1))]
    assert result.shape == (rows, 16)


def test_tensorwise_sums_beyond_fp16_do_not_overflow():
    x = torch.full((2, 64), 448.0).to(torch.float8_e4m3fn)
    weight = torch.full((16, 64), 448.0).to(torch.float8_e4m3fn)
    tiny = [torch.full((count,), 1e-4) for count in (2, 16)]
    result = scaled_matmul_fp8_tensorwise(x, tiny[0], weight, tiny[1], None, torch.float16)
    torch.testing.assert_close(result, torch.full((2, 16), 448.0**2 * 64 * 1e-8, dtype=torch.float16))


@pytest.mark.parametrize(
    ("compute", "shape"), [("fp8", (16, 24)), ("fp8", (24, 16)), ("int8", (8, 12)), ("int8", (12, 8))]
)
def test_shapes_that_eight_bit_products_cannot_take(compute, shape):
    assert f"{shape[0]} x {shape[1]}" in shape_obstacle(compute, shape)
    x, x_scale, weight, weight_scale = operands(3, shape[1], shape[0], compute, "cpu")
    products = {"fp8": FP8_PRODUCTS, "int8": (matmul_int8,)}[compute]
    for product in products:
        with pytest.raises(UnsupportedShapeError, match=compute):
            product(x, x_scale, weight, weight_scale, None, torch.bfloat16)


def test_shapes_that_can():
    assert shape_obstacle("fp8", (21504, 3072)) is None
    assert shape_obstacle("int8", (3072, 15360)) is None
    assert shape_obstacle("bf16", (3, 5)) is None
    assert str(INT8_WIDEST) in shape_obstacle("int8", (8, 8 * INT8_WIDEST))


@pytest.mark.parametrize("name", SCALED_PRODUCTS)
def test_scaled_products_trace_in_one_graph(name):
    scaled = operands(37, 64, 48, "int8" if name == "int_mm" else "fp8", "cpu")
    product = SCALED_PRODUCTS[name]
    skip_row_scales(product, "cpu")
    compiled = torch.compile(lambda *given: product(*given, None, torch.bfloat16), fullgraph=True, backend="eager")
    assert torch.equal(compiled(*scaled), product(*scaled, None, torch.bfloat16))
