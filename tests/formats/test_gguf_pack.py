"""Packing: bytes equal to the `gguf` package's where it packs; searched scales err no more than ggml's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.errors import InvalidOptionError, UnknownStorageError, UnsupportedShapeError
from gossamer.formats.gguf import BLOCK_TYPES, codec, pack, unpack
from gossamer.formats.gguf.k_scales import join_q3_k_scales, join_q4_k_scales, split_q3_k_scales, split_q4_k_scales

SAME_BYTES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
SEARCHED = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
DISTRIBUTIONS = ("normal", "laplace", "student3")

# Relative errors |decoded - w| / |w| of ggml 0.25.3 (the library inside llama-cpp-python 0.3.36, built from source):
# `ggml_quantize_chunk` without importance weights on `weights(distribution)` below, decoded by gguf 0.19.
GGML_ERRORS = {
    "Q2_K": (0.295827, 0.341458, 0.356106),
    "Q3_K": (0.150543, 0.172975, 0.194410),
    "Q4_K": (0.071864, 0.083524, 0.093424),
    "Q5_K": (0.036225, 0.042711, 0.047189),
    "Q6_K": (0.017756, 0.021719, 0.025998),
    "IQ4_NL": (0.075930, 0.087246, 0.103942),
    "IQ4_XS": (0.076414, 0.087954, 0.105299),
}
# The norms of those weights: a NumPy whose random streams differ fails here and not in the comparison.
NORMS = {"normal": 2.5470693, "laplace": 2.5526927, "student3": 2.5133000}


def encode(weight: torch.Tensor, name: str) -> torch.Tensor:
    return pack(weight, name).tensors["blocks"]


def weights(distribution: str) -> np.ndarray:
    """Seeded weights (16, 1024) of standard deviation 0.02; Student's t with 3 degrees has heavy tails."""
    rng, shape = np.random.default_rng(1), (16, 1024)
    unit = {
        "normal": lambda: rng.standard_normal(shape),
        "laplace": lambda: rng.laplace(size=shape) / np.sqrt(2),
        "student3": lambda: rng.standard_t(3, size=shape) / np.sqrt(3),
    }
    return (0.02 * unit[distribution]()).astype(np.float32)


def relative_error(weight: np.ndarray, blocks: torch.Tensor, name: str) -> float:
    decoded = quants.dequantize(blocks.numpy(), GGMLQuantizationType[name]).astype(np.float64)
    return float(np.linalg.norm(decoded - weight) / np.linalg.norm(weight.astype(np.float64)))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_weights_are_those_that_ggml_packed(distribution):
    assert np.linalg.norm(weights(distribution).astype(np.float64)) == pytest.approx(NORMS[distribution], rel=1e-7)


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_error_is_no_larger_than_ggml_s(name, distribution):
    weight = weights(distribution)
    error = relative_error(weight, encode(torch.from_numpy(weight), name), name)
    assert error <= GGML_ERRORS[name][DISTRIBUTIONS.index(distribution)]


@pytest.mark.parametrize("name", SEARCHED)
def test_rows_of_mixed_size_have_the_same_relative_error(name):
    """Scales are relative to a block: neighbours of another magnitude and the chunk borders change nothing."""
    weight = weights("normal")[:8]
    factors = 2.0 ** np.arange(-4, 4, dtype=np.float32)
    blocks = encode(torch.from_numpy(weight * factors[:, None]), name)
    for row, factor in enumerate(factors):
        alone = encode(torch.from_numpy(weight[row : row + 1] * factor), name)
        assert torch.equal(blocks[row : row + 1], alone)
        assert relative_error(weight[row] * factor, blocks[row], name) < 1.2 * GGML_ERRORS[name][0]


@pytest.mark.parametrize("name", SAME_BYTES)
@given(
    rows=st.integers(1, 4),
    blocks=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    exponent=st.integers(-40, 12),
    distinct=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_bytes_equal_the_package_s(name, rows, blocks, seed, exponent, distinct):
    weight = np.random.default_rng(seed).standard_normal((rows, 32 * blocks)) * 2.0**exponent
    # few distinct values give ties: equal extremes of both signs, and codes exactly between two integers
    weight = weight if distinct else np.round(weight * 2.0**-exponent) * 2.0**exponent
    weight = weight.astype(np.float32)
    with np.errstate(all="ignore"):
        expected = quants.quantize(weight, GGMLQuantizationType[name])
    assert np.array_equal(encode(torch.from_numpy(weight), name).numpy(), expected)


@pytest.mark.parametrize("name", SAME_BYTES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_bytes_of_weights_equal_the_package_s(name, distribution):
    weight = weights(distribution)
    expected = quants.quantize(weight, GGMLQuantizationType[name])
    assert np.array_equal(encode(torch.from_numpy(weight), name).numpy(), expected)


@pytest.mark.parametrize("name", SAME_BYTES + SEARCHED)
def test_round_trip_agrees_with_the_package(name):
    weight = weights("student3")
    blocks = encode(torch.from_numpy(weight), name)
    expected = quants.dequantize(blocks.numpy(), GGMLQuantizationType[name])
    assert np.array_equal(unpack(blocks, name, weight.shape).numpy(), expected)


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("value", [0.0, 0.02, -0.02, 1e-30, -1e-42, 3e-6, 60000.0, -65504.0])
def test_constant_weights(name, value):
    """A constant is held up to the precision of the scales, and underflow gives zeros, never NaN."""
    weight = torch.full((2, 256), value)
    decoded = unpack(encode(weight, name), name, (2, 256))
    # d may be subnormal: half of the smallest float16 times the largest integer scale and level, 2^-25 * 128 * 32
    torch.testing.assert_close(decoded, weight, rtol=2e-3, atol=1.3e-4)


@pytest.mark.parametrize("name", SEARCHED)
def test_one_outlier_among_zeros(name):
    weight = torch.zeros(1, 256)
    weight[0, 77] = -0.5
    decoded = unpack(encode(weight, name), name, (1, 256))
    assert decoded[0, 77] == pytest.approx(-0.5, rel=2e-3)
    # IQ4 types have no level 0, their smallest is 1 of 127; other sub-blocks get the scale 0
    assert decoded.count_nonzero() <= 32
    assert decoded.abs().sort().values[0, -2] <= 0.5 / 126


@pytest.mark.parametrize("name", SEARCHED)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_no_weight_decodes_to_nan_or_beyond_its_range(name, data):
    values = data.draw(st.lists(st.floats(-65504, 65504, width=32), min_size=1, max_size=40))
    weight = torch.tensor(values).repeat(256 // len(values) + 1)[:256].view(1, 256)
    decoded = unpack(encode(weight, name), name, (1, 256))
    assert decoded.isfinite().all()
    assert (decoded - weight).norm() <= 0.5 * weight.norm() + 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_packed_as_float32(dtype):
    weight = torch.from_numpy(weights("normal")[:4]).to(dtype)
    assert torch.equal(encode(weight, "Q4_K"), encode(weight.float(), "Q4_K"))


def test_chunks_join_seamlessly(monkeypatch):
    weight = torch.from_numpy(weights("normal")[:4])
    whole = {name: encode(weight, name) for name in SAME_BYTES + SEARCHED}
    monkeypatch.setattr(codec, "_CPU_CHUNK_ELEMENTS", 768)
    for name, blocks in whole.items():
        assert torch.equal(encode(weight, name), blocks)


def test_a_transposed_parameter_that_requires_a_gradient():
    weight = torch.nn.Parameter(torch.from_numpy(weights("normal")).view(64, 256))
    blocks = encode(weight.t()[:, :32], "Q8_0")
    assert not blocks.requires_grad
    assert torch.equal(blocks, encode(weight.detach().t()[:, :32].contiguous(), "Q8_0"))


def test_scale_layouts_are_inverses():
    packed = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (500, 12), dtype=np.uint8))
    assert torch.equal(join_q4_k_scales(*split_q4_k_scales(packed)), packed)
    assert torch.equal(join_q3_k_scales(split_q3_k_scales(packed)), packed)


@pytest.mark.parametrize("name", [name for name, kind in BLOCK_TYPES.items() if kind.encode is None])
def test_types_without_a_packer_say_so(name):
    with pytest.raises(InvalidOptionError, match="Q4_K"):
        pack(torch.zeros(2, 256), name)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K"])
@pytest.mark.parametrize(("value", "why"), [(float("nan"), "finite"), (-float("inf"), "finite"), (-70000.0, "float16")])
def test_weights_out_of_range_are_refused(name, value, why):
    weight = torch.zeros(2, 256)
    weight[1, 3] = value
    with pytest.raises(InvalidOptionError, match=why):
        pack(weight, name)


def test_bad_weights_are_refused():
    with pytest.raises(UnsupportedShapeError, match="blocks of 256"):
        pack(torch.zeros(2, 128), "Q4_K")
    with pytest.raises(InvalidOptionError, match="int64"):
        pack(torch.zeros(2, 256, dtype=torch.int64), "Q4_K")
    with pytest.raises(UnsupportedShapeError, match="2-D"):
        pack(torch.zeros(2, 2, 256), "Q4_K")
    with pytest.raises(UnknownStorageError, match="Q4_K"):
        pack(torch.zeros(2, 256), "q4_k")
