"""The Triton pointwise kernels against their torch references: in the interpreter, or on a GPU where there is one."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gossamer.errors import InvalidOptionError, UnsupportedShapeError
from gossamer.kernels.pointwise import HeadNorm, Modulation, Rotation, Rows, TextNorm
from gossamer.kernels.pointwise.backends import TORCH, triton_functions
from gossamer.kernels.pointwise.launch import Launcher, Pieces, Plan, head_tiles, pieces, warps

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRITON = triton_functions()
# fp8 stores come out wrong in the interpreter; the tests marked `gpu` have them
DTYPES = [torch.float32, torch.float16, torch.int8]
# it reads bfloat16 as it should, but stores it truncated
LOADED = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
WIDTHS = st.sampled_from([8, 24, 40, 64, 96])
few = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fresh memory is NaN, or the largest integer, so that a value that no kernel wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with torch.no_grad():
        yield
    torch.use_deterministic_algorithms(False)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def strided(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A view into a buffer that is longer in the last two dimensions."""
    batch, tokens, width = shape
    return normal(batch, tokens + 2, width + 8, seed=seed, dtype=dtype)[:, 1:-1, 8:]


def assert_rows(found: Rows, expected: Rows) -> None:
    """Equal but for sums in another order; a code may then fall on the other side of a tie."""
    assert found.values.dtype == expected.values.dtype
    if expected.scale is None:
        assert found.scale is None
        step = max(torch.finfo(expected.values.dtype).eps, 1e-6)
        torch.testing.assert_close(found.values, expected.values, rtol=4 * step, atol=4 * step)
    else:
        torch.testing.assert_close(found.scale, expected.scale, rtol=1e-5, atol=0.0)
        difference = (found.values.int() - expected.values.int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).sum() <= max(2, difference.numel() // 50)


def test_the_poison_works():
    assert torch.empty(4, device=DEVICE).isnan().all()
    assert (torch.empty(4, dtype=torch.int8, device=DEVICE) == 127).all()


@few
@given(st.integers(1, 2), st.integers(1, 5), WIDTHS, st.sampled_from(DTYPES), LOADED, st.integers(0, 99))
def test_norm_modulate(batch, tokens, width, dtype, loaded, seed):
    x = strided(batch, tokens, width, seed=seed, dtype=loaded)
    vectors = normal(batch, 3 * width, seed=seed + 1, dtype=loaded)
    by = Modulation(vectors[:, :width], vectors[:, width : 2 * width])
    assert_rows(TRITON.norm_modulate(x, by, dtype), TORCH.norm_modulate(x, by, dtype))


@few
@given(
    st.integers(1, 2),
    st.integers(1, 5),
    WIDTHS,
    st.sampled_from(DTYPES),
    st.sampled_from([torch.float32, torch.float16]),
    st.integers(0, 99),
)
def test_residual_gate_norm_modulate(batch, tokens, width, dtype, residual, seed):
    x, y = (strided(batch, tokens, width, seed=seed + i, dtype=residual) for i in range(2))
    gate, scale, shift = normal(batch, 3 * width, seed=seed + 2).chunk(3, dim=1)
    own, by = x.clone(), Modulation(scale, shift)
    expected = TORCH.residual_gate_norm_modulate_(own, gate, y, by, dtype)
    assert_rows(TRITON.residual_gate_norm_modulate_(x, gate, y, by, dtype), expected)
    torch.testing.assert_close(x, own)


@few
@given(st.integers(1, 2), st.integers(1, 5), WIDTHS, st.integers(0, 99))
def test_residual_gate(batch, tokens, width, seed):
    x, y = (strided(batch, tokens, width, seed=seed + i, dtype=torch.float16) for i in range(2))
    gate = normal(1, width, seed=seed + 2)  # one for all pictures of the batch
    own = x.clone()
    assert TRITON.residual_gate_(x, gate, y) is x
    torch.testing.assert_close(x, TORCH.residual_gate_(own, gate, y))


@few
@given(
    st.integers(1, 2),
    st.integers(1, 5),
    st.sampled_from([1, 3, 4, 6]),
    st.sampled_from([2, 8, 16]),
    st.sampled_from([None, 0, 2, 5]),
    st.sampled_from([torch.float32, torch.float16]),
    st.integers(0, 99),
)
def test_qk_norm_rope(batch, tokens, heads, dim, text_tokens, dtype, seed):
    qkv = strided(batch, tokens, 3 * heads * dim, seed=seed, dtype=dtype)
    rotation = Rotation(normal(tokens, dim // 2, seed=seed + 1), normal(tokens, dim // 2, seed=seed + 2))
    image, text = (HeadNorm(normal(dim, seed=seed + i), normal(dim, seed=seed + i + 1)) for i in (3, 5))
    own = TextNorm(text_tokens, text) if text_tokens is not None else None
    expected = TORCH.qk_norm_rope_(qkv.clone(), rotation, image, own)
    assert TRITON.qk_norm_rope_(qkv, rotation, image, own) is qkv
    step = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(qkv, expected, rtol=4 * step, atol=4 * step)


def test_qk_norm_rope_leaves_its_surroundings_alone():
    buffer = normal(2, 3, 3 * 32 + 40)
    before = buffer.clone()
    rotation, norm = Rotation(normal(3, 8), normal(3, 8, seed=1)), HeadNorm(normal(16), normal(16, seed=2))
    TRITON.qk_norm_rope_(buffer[..., :96], rotation, norm, None)
    assert torch.equal(buffer[..., 64:], before[..., 64:])
    assert (buffer[..., :64] != before[..., :64]).any()


@few
@given(st.integers(1, 2), st.integers(1, 5), WIDTHS, WIDTHS, st.sampled_from(DTYPES), LOADED, st.integers(0, 99))
def test_gelu_and_rows(batch, tokens, width, mlp_width, dtype, loaded, seed):
    attention = strided(batch, tokens, width, seed=seed, dtype=loaded)
    mlp = strided(batch, tokens, mlp_width, seed=seed + 1, dtype=loaded)
    assert_rows(TRITON.gelu_concat(attention, mlp, dtype), TORCH.gelu_concat(attention, mlp, dtype))
    assert_rows(TRITON.gelu_rows(mlp, dtype), TORCH.gelu_rows(mlp, dtype))
    assert_rows(TRITON.quantize_rows(mlp, dtype), TORCH.quantize_rows(mlp, dtype))


def test_gelu_over_its_whole_range():
    x = torch.cat((torch.linspace(-12, 12, 1016), torch.tensor([-1e30, -3e4, -88.0, -0.0, 0.0, 88.0, 3e4, 1e30])))
    x = x[None, None].to(DEVICE)
    found, expected = TRITON.gelu_rows(x, torch.float32).values, TORCH.gelu_rows(x, torch.float32).values
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)


@few
@given(st.integers(1, 5), st.integers(1, 70), st.booleans(), st.booleans(), st.integers(0, 99))
def test_rescale_product(rows, columns, biased, half, seed):
    product = (normal(rows, columns + 3, seed=seed) * 1e5).int()[:, 3:]
    row_scale, column_scale = normal(rows, seed=seed + 1).abs(), normal(columns, seed=seed + 2).abs() * 1e-5
    bias = normal(columns, seed=seed + 3) if biased else None
    dtype = torch.float16 if half else torch.float32
    arguments = (product, row_scale, column_scale, bias, dtype)
    torch.testing.assert_close(TRITON.rescale_product(*arguments), TORCH.rescale_product(*arguments))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_no_code_hides_a_nan_or_an_infinity(bad):
    x = normal(1, 3, 48)
    x[0, 1, 37] = bad
    by = Modulation(normal(1, 48), normal(1, 48))
    for found in (
        TRITON.quantize_rows(x, torch.int8),
        TRITON.gelu_rows(x, torch.int8),
        TRITON.gelu_concat(x, normal(1, 3, 8), torch.int8),
        TRITON.gelu_concat(normal(1, 3, 8), x, torch.int8),
        TRITON.norm_modulate(x, by, torch.int8),
    ):
        assert found.scale.isfinite().tolist() == [[True, False, True]]


def test_a_row_of_zeros_gets_codes_of_zero():
    found = TRITON.quantize_rows(torch.zeros(1, 2, 24, device=DEVICE), torch.int8)
    assert not found.values.any()
    assert torch.equal(found.scale, torch.full((1, 2), 2.0**-64 / 127, device=DEVICE))


def test_a_faint_row_is_not_blown_up():
    """Where the variance is far below eps, eps decides."""
    x, by = normal(1, 2, 16) * 1e-4, Modulation(normal(1, 16, seed=1), normal(1, 16, seed=2))
    assert_rows(TRITON.norm_modulate(x, by, torch.float32), TORCH.norm_modulate(x, by, torch.float32))
    qkv, norm = normal(1, 2, 48) * 1e-4, HeadNorm(normal(8, seed=1), normal(8, seed=2))
    rotation = Rotation(normal(2, 4, seed=3), normal(2, 4, seed=4))
    expected = TORCH.qk_norm_rope_(qkv.clone(), rotation, norm)
    torch.testing.assert_close(TRITON.qk_norm_rope_(qkv, rotation, norm, None), expected)


def test_a_float16_residual_saturates():
    x = torch.full((1, 1, 8), 60000.0, dtype=torch.float16, device=DEVICE)
    x[0, 0, 3] = math.nan
    TRITON.residual_gate_(x, torch.ones(1, 8, device=DEVICE), x.clone())
    assert x[0, 0, 0] == 65504
    assert x[0, 0, 3].isnan()


def test_torch_compile_sees_one_graph_of_opaque_operators():
    x, y = normal(1, 3, 32), normal(1, 3, 32, seed=1)
    gate, scale, shift = normal(3, 1, 32, seed=2)
    rotation, norm = Rotation(normal(3, 4), normal(3, 4, seed=1)), HeadNorm(normal(8), normal(8, seed=2))

    def step(x: torch.Tensor, qkv: torch.Tensor, functions=TRITON) -> tuple[torch.Tensor, ...]:
        rows = functions.residual_gate_norm_modulate_(x, gate, y, Modulation(scale, shift), torch.int8)
        functions.qk_norm_rope_(qkv[..., :96], rotation, norm, None)
        joined = functions.gelu_concat(qkv[..., :32], qkv[..., 96:], torch.float32)
        functions.residual_gate_(x, gate, functions.gelu_rows(y, x.dtype).values)
        return rows.dequantize(), joined.values, x, qkv

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    qkv = normal(1, 3, 160, seed=5)
    for found, expected in zip(compiled(x.clone(), qkv.clone()), step(x.clone(), qkv.clone(), TORCH), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_operators_tell_the_truth_about_themselves():
    x, vector = normal(1, 2, 16), normal(1, 16, seed=1)
    gossamer = torch.ops.gossamer
    plain, coded = torch.float32, torch.int8
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(gossamer.norm_modulate, (x, vector, vector, coded, 1e-6), test_utils=checks)
    torch.library.opcheck(gossamer.residual_gate_, (x, vector, x.clone()), test_utils=checks)
    fused = (x, vector, x.clone(), vector, vector, plain, 1e-6)
    torch.library.opcheck(gossamer.residual_gate_norm_modulate_, fused, test_utils=checks)
    torch.library.opcheck(gossamer.gelu_rows, (x, coded), test_utils=checks)
    torch.library.opcheck(gossamer.quantize_rows, (x, plain), test_utils=checks)
    torch.library.opcheck(gossamer.gelu_concat, (x, x.clone(), coded), test_utils=checks)
    rope = (normal(1, 2, 48), normal(2, 4), normal(2, 4), *normal(4, 8), 1, 1e-6)
    torch.library.opcheck(gossamer.qk_norm_rope_, rope, test_utils=checks)
    product = (x[0].int(), normal(2), normal(16), None, plain)
    torch.library.opcheck(gossamer.rescale_product, product, test_utils=checks)


def test_inference_mode_and_parameters():
    with torch.inference_mode():
        x, by = normal(1, 2, 16), Modulation(normal(1, 16), normal(1, 16))
        TRITON.residual_gate_norm_modulate_(x, by.scale, x.clone(), by, torch.int8)
    weight = torch.nn.Parameter(normal(8))
    rotation = Rotation(normal(2, 4), normal(2, 4))
    assert TRITON.qk_norm_rope_(normal(1, 2, 48), rotation, HeadNorm(weight, weight), None).isfinite().all()


def every_function(x: torch.Tensor, qkv: torch.Tensor) -> list[torch.Tensor]:
    """What every function makes of these tensors."""
    gate, scale, shift = normal(3, 1, 48, seed=2)
    by, rotation = Modulation(scale, shift), Rotation(normal(3, 4), normal(3, 4, seed=1))
    norm = HeadNorm(normal(8), normal(8, seed=2))
    rows = [
        TRITON.norm_modulate(x, by, torch.int8),
        TRITON.residual_gate_norm_modulate_(x, gate, qkv, by, torch.float16),
        TRITON.gelu_concat(x, qkv, torch.int8),
        TRITON.gelu_rows(x, torch.float32),
        TRITON.quantize_rows(x, torch.int8),
    ]
    product = TRITON.rescale_product(x[0].int(), normal(3), normal(48), None, torch.float32)
    plain = [TRITON.residual_gate_(x, gate, qkv), TRITON.qk_norm_rope_(qkv, rotation, norm, TextNorm(1, norm)), product]
    return [*plain, *(part for one in rows for part in (one.values, one.scale) if part is not None)]


def test_operators_run_the_same_kernels_where_gradients_are_recorded():
    x, qkv = normal(1, 3, 48), normal(1, 3, 48, seed=1)
    straight = every_function(x.clone(), qkv.clone())
    with torch.enable_grad():
        through = every_function(x.clone(), qkv.clone())
        assert all(torch.equal(found, expected) for found, expected in zip(through, straight, strict=True))
        rows = TRITON.gelu_rows(x.requires_grad_(), torch.float32)
        with pytest.raises(RuntimeError, match=r"through gossamer\.gelu_rows"):
            rows.values.sum().backward()


def test_what_does_not_fit_is_refused_before_the_launch():
    x, vector = normal(2, 3, 16), normal(2, 16)
    by = Modulation(vector, vector)
    with pytest.raises(UnsupportedShapeError, match="y has shape"):
        TRITON.residual_gate_(x, vector, normal(2, 4, 16))
    with pytest.raises(UnsupportedShapeError, match="gate has shape"):
        TRITON.residual_gate_(x, normal(2, 8), x.clone())
    with pytest.raises(InvalidOptionError, match="stride 3 along"):
        TRITON.norm_modulate(normal(2, 16, 3).mT, by, torch.float32)
    with pytest.raises(UnsupportedShapeError, match="rows of 99 values"):
        TRITON.quantize_rows(normal(1, 1, 99), torch.int8)
    with pytest.raises(InvalidOptionError, match="float8_e5m2"):
        TRITON.quantize_rows(x, torch.float8_e5m2)
    with pytest.raises(UnsupportedShapeError, match="attention has shape"):
        TRITON.gelu_concat(normal(2, 4, 16), x, torch.int8)
    rotation = Rotation(normal(3, 2), normal(3, 2))
    with pytest.raises(UnsupportedShapeError, match="query has shape"):
        TRITON.qk_norm_rope_(normal(2, 3, 24), rotation, HeadNorm(normal(8), normal(4)), None)
    with pytest.raises(UnsupportedShapeError, match="heads of 6 values"):
        TRITON.qk_norm_rope_(
            normal(2, 3, 36), Rotation(normal(3, 3), normal(3, 3)), HeadNorm(normal(6), normal(6)), None
        )
    with pytest.raises(UnsupportedShapeError, match="column_scale has shape"):
        TRITON.rescale_product(x[0].int(), normal(3), normal(8), None, torch.float32)


class RecordingKernel:
    """Stands for a kernel and for its machine code, and notes what it is launched with."""

    def __init__(self) -> None:
        self.compilations: list[tuple] = []
        self.launches: list[tuple] = []

    def __getitem__(self, grid):
        def launch(*arguments, num_warps=None):
            if num_warps is None:
                self.launches.append((grid, *arguments))
            else:
                self.compilations.append((grid, *arguments, num_warps))
            return self

        return launch


def test_a_launch_is_prepared_once_for_every_layout_and_keeps_no_tensor():
    kernel, planned = RecordingKernel(), []

    def plan(x: torch.Tensor, _: None, width: int) -> Plan:
        planned.append((x.dtype, width))
        return Plan((x.shape[0], 1, 1), (width,), 4)

    launcher, buffer = Launcher(kernel, plan), torch.zeros(64)
    aligned, shifted = buffer[:32].view(4, 8), buffer[1:33].view(4, 8)
    for x in (aligned, aligned, shifted, aligned.clone()):
        launcher(x, None, options=(8,))(x, None)
    launcher(aligned, None, options=(16,))(aligned, None)
    launcher(aligned.half(), None, options=(8,))
    assert planned == [(torch.float32, 8), (torch.float32, 8), (torch.float32, 16), (torch.float16, 8)]
    assert [call[-1] for call in kernel.compilations] == [4, 4, 4]
    assert [(call[0], *call[2:]) for call in kernel.launches] == [((4, 1, 1), None, 8)] * 2
    kernel.launches.clear()
    kernel.compilations.clear()
    gone = weakref.ref(aligned)
    del x, aligned
    assert gone() is None


def test_refused_tensors_are_refused_again():
    for _ in range(2):
        with pytest.raises(UnsupportedShapeError, match="rows of 99 values"):
            TRITON.quantize_rows(normal(1, 1, 99), torch.int8)


def test_rows_are_taken_in_power_of_two_pieces_without_padding():
    assert pieces(3072) == Pieces(1024, 3)
    assert pieces(12288) == Pieces(4096, 3)
    assert pieces(256) == Pieces(256, 1)
    for width in range(128, 4096, 128):
        assert pieces(width).block * pieces(width).count == width
    assert (head_tiles(24, 128).heads, head_tiles(24, 128).count) == (8, 3)
    assert (head_tiles(8, 32).heads, head_tiles(8, 32).count) == (8, 1)
    assert [warps(width, 32, 4096) for width in (8, 256, 3072)] == [1, 1, 4]
    assert [warps(width, 64, 4096) for width in (12288, 15360, 10**6)] == [8, 8, 16]
    assert [warps(15360, 64, piece) for piece in (8, 512, 1024)] == [1, 2, 4]
