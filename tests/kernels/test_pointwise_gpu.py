"""The Triton pointwise kernels on a GPU, in bfloat16 and with every row type, at FLUX's shapes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gossamer.kernels.pointwise import HeadNorm, Modulation, Rotation, Rows, TextNorm
from gossamer.kernels.pointwise.backends import TORCH, triton_functions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WIDTH, HEAD_SIZE, TEXT_TOKENS = 3072, 128, 512
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    """As models are run; the kernels are then launched straight, not through their operators."""
    with torch.no_grad():
        yield


@pytest.fixture(params=[4608, 1031], ids=["1024x1024", "odd"])
def tokens(request) -> int:
    return request.param


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    if request.param == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this chip has no fp8")
    return request.param


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)


def assert_rows(found: Rows, expected: Rows) -> None:
    """No further apart than one step of the row type, and hardly ever that far."""
    assert found.values.dtype == expected.values.dtype
    assert (found.scale is None) == (expected.scale is None)
    if expected.scale is not None:
        torch.testing.assert_close(found.scale, expected.scale, rtol=1e-5, atol=0.0)
    ours, theirs = found.dequantize(), expected.dequantize()
    assert ours.isfinite().all()
    dtype = expected.values.dtype
    relative = 4e-6 if dtype == torch.float32 else torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    least = {torch.int8: 1.0, torch.float8_e4m3fn: 2.0**-9}.get(dtype, 0.0)
    step = least * (expected.scale[..., None] if expected.scale is not None else 1.0)
    difference = (ours - theirs).abs()
    assert (difference <= theirs.abs() * relative + step * 1.001 + 1e-5).all()
    if dtype != torch.float32:  # the codes themselves: two scales may differ in their last bit
        assert (found.values.float() != expected.values.float()).float().mean() < 0.02


def assert_residual(found: torch.Tensor, expected: torch.Tensor) -> None:
    """A fused multiply-add may fall on the other side of a tie."""
    torch.testing.assert_close(found, expected, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-6)
    assert (found != expected).float().mean() < 0.01


def test_norm_modulate(tokens, dtype):
    x, y = normal(2, tokens, WIDTH), normal(2, tokens, WIDTH, seed=1)
    gate, scale, shift = normal(2, 6 * WIDTH, seed=2)[:, : 3 * WIDTH].chunk(3, dim=1)
    triton, by, own = triton_functions(), Modulation(scale, shift), x.clone()
    assert_rows(triton.norm_modulate(x, by, dtype), TORCH.norm_modulate(x, by, dtype))
    TORCH.residual_gate_(own, gate, y)
    found = triton.residual_gate_norm_modulate_(x, gate, y, by, dtype)
    assert_residual(x, own)
    assert_rows(found, TORCH.norm_modulate(x, by, dtype))


def test_residual_gate(tokens):
    x, y, gate = normal(2, tokens, WIDTH), normal(2, tokens, WIDTH, seed=1), normal(1, WIDTH, seed=2)
    own = x.clone()
    triton_functions().residual_gate_(x, gate, y)
    assert_residual(x, TORCH.residual_gate_(own, gate, y))


@pytest.mark.parametrize("text", [True, False], ids=["double", "single"])
def test_qk_norm_rope(tokens, text):
    buffer = normal(1, tokens, 7 * WIDTH)
    before = buffer.clone()
    angles = torch.rand(tokens, HEAD_SIZE // 2, device="cuda") * 100
    rotation = Rotation(angles.cos(), angles.sin())
    image, own = (HeadNorm(normal(HEAD_SIZE, seed=i), normal(HEAD_SIZE, seed=i + 1)) for i in (1, 3))
    first = TextNorm(TEXT_TOKENS, own) if text else None
    expected = TORCH.qk_norm_rope_(before.clone()[..., : 3 * WIDTH], rotation, image, first)
    triton_functions().qk_norm_rope_(buffer[..., : 3 * WIDTH], rotation, image, first)
    assert torch.equal(buffer[..., 2 * WIDTH :], before[..., 2 * WIDTH :])
    torch.testing.assert_close(buffer[..., : 3 * WIDTH], expected, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-5)


def test_gelu_and_rows(tokens, dtype):
    buffer, attention, triton = normal(1, tokens, 7 * WIDTH), normal(1, tokens, WIDTH, seed=1), triton_functions()
    mlp = buffer[..., 3 * WIDTH :]
    assert_rows(triton.gelu_concat(attention, mlp, dtype), TORCH.gelu_concat(attention, mlp, dtype))
    assert_rows(triton.gelu_rows(mlp, dtype), TORCH.gelu_rows(mlp, dtype))
    assert_rows(triton.quantize_rows(attention, dtype), TORCH.quantize_rows(attention, dtype))


def test_rescale_product(tokens):
    product = torch.randint(-(2**28), 2**28, (tokens, WIDTH), dtype=torch.int32, device="cuda")
    scales = normal(tokens).abs().float() * 1e-4, normal(WIDTH, seed=1).abs().float() * 1e-4
    arguments = (product, *scales, normal(WIDTH, seed=2), torch.bfloat16)
    found, expected = triton_functions().rescale_product(*arguments), TORCH.rescale_product(*arguments)
    torch.testing.assert_close(found, expected, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-5)


def test_no_code_hides_a_nan(dtype):
    x = normal(1, 8, WIDTH)
    x[0, 3, 77] = torch.nan
    rows = triton_functions().quantize_rows(x, dtype).dequantize()
    assert rows[0, 3, 77].isnan()
    assert rows[0, 4].isfinite().all()


def test_a_prepared_launch_and_an_operator_do_what_the_first_launch_did(dtype):
    triton, (scale, shift) = triton_functions(), normal(2, 1, WIDTH, seed=2)
    by, x = Modulation(scale, shift), normal(1, 96, WIDTH)
    first = [triton.norm_modulate(x, by, dtype), triton.gelu_concat(x, x, dtype)]
    again = [triton.norm_modulate(x.clone(), by, dtype), triton.gelu_concat(x.clone(), x, dtype)]
    with torch.enable_grad():
        through = [triton.norm_modulate(x, by, dtype), triton.gelu_concat(x, x, dtype)]
    for one, *others in zip(first, again, through, strict=True):
        assert all(torch.equal(one.dequantize(), other.dequantize()) for other in others)


def test_a_launch_on_an_odd_address_reads_every_value():
    """Machine code that loads 16 bytes at a time is not used where they are not aligned."""
    triton, buffer = triton_functions(), normal(1, 8, WIDTH + 8)
    for shift in (0, 1, 8):
        x = buffer.flatten()[shift : shift + 8 * WIDTH].view(1, 8, WIDTH)
        assert torch.equal(triton.quantize_rows(x, torch.float32).values, x.float())


def test_a_new_resolution_compiles_nothing():
    """A kernel's variants depend on widths and types only."""
    from gossamer.kernels.pointwise.triton_gelu import head_tail_kernel

    triton, device = triton_functions(), torch.cuda.current_device()
    triton.gelu_rows(normal(1, 1024, WIDTH), torch.bfloat16)
    variants = len(head_tail_kernel.device_caches[device][0])
    for count in (1, 16, 1031, 4608):
        triton.gelu_rows(normal(1, count, WIDTH), torch.bfloat16)
    assert len(head_tail_kernel.device_caches[device][0]) == variants
