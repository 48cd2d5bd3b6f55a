"""Scaled fp8 in its spellings: the same numbers as the formula in float64 rounded once, and as diffusers' fp8r."""

from __future__ import annotations

import pytest
import torch
from diffusers.quantizers.bfl.utils import dequantize_fp8r, quantize_fp8r
from tensor_sources import MemorySource

from gossamer.checkpoints.encodings import scaled_fp8
from gossamer.errors import FileDamagedError, UnknownStorageError
from gossamer.formats import unpack

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def weights(dtype=E4M3, shape=(6, 8)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def expected(codes, scale):
    """The product in float64, where it is exact, rounded to float32."""
    return (codes.to(torch.float64) * scale.to(torch.float64).reshape(-1, 1)).float()


@pytest.mark.parametrize(("dtype", "storage"), [(E4M3, "fp8"), (E5M2, "fp8_e5m2")])
@pytest.mark.parametrize("shape", [(), (1,), (6,), (6, 1)])
@pytest.mark.parametrize("names", [("scale_weight", "scale_input"), ("weight_scale", "input_scale")])
def test_both_spellings_with_a_scale_or_one_a_row(dtype, storage, shape, names):
    codes, scale = weights(dtype), torch.rand(shape) + 0.01
    tensors = {"a.weight": codes, f"a.{names[0]}": scale, f"a.{names[1]}": torch.ones(()), "a.bias": codes[0]}
    source = MemorySource(tensors)
    assert scaled_fp8.find(source, tensors) == {"a.weight": ("a.weight", f"a.{names[0]}", f"a.{names[1]}")}
    packed = scaled_fp8.read(source, "a.weight")
    assert packed.format == storage
    assert packed.shape == (6, 8)
    assert packed.tensors["scale"].shape == (6,)
    assert packed.tensors["codes"].data_ptr() == codes.data_ptr()
    assert torch.equal(unpack(packed, torch.float32), expected(codes, scale.expand(6, 1) if not shape else scale))


def test_rows_as_diffusers_reads_them():
    codes, scale = quantize_fp8r(torch.randn(16, 32))
    packed = scaled_fp8.read(MemorySource({"a.weight": codes, "a.weight_scale": scale}), "a.weight")
    assert torch.equal(unpack(packed, torch.float32), dequantize_fp8r(codes, scale))


def test_a_scale_in_bf16():
    codes, scale = weights(), torch.tensor(0.0371).bfloat16()
    packed = scaled_fp8.read(MemorySource({"a.weight": codes, "a.scale_weight": scale}), "a.weight")
    assert torch.equal(unpack(packed, torch.float32), expected(codes, scale.expand(6)))


def test_int8_rows_without_a_description():
    codes, scale = torch.randint(-127, 128, (6, 8), dtype=torch.int8), torch.rand(6, 1)
    packed = scaled_fp8.read(MemorySource({"a.weight": codes, "a.scale_weight": scale}), "a.weight")
    assert packed.format == "int8"
    assert torch.equal(unpack(packed, torch.float32), expected(codes, scale))


def test_a_weight_of_full_precision_with_a_scale_beside_it():
    weight = torch.randn(4, 4).bfloat16()
    source = MemorySource({"a.weight": weight, "a.scale_weight": torch.ones(())})
    assert scaled_fp8.read(source, "a.weight").data_ptr() == weight.data_ptr()
    source = MemorySource({"a.weight": weight, "a.scale_weight": torch.tensor(3.0)})
    assert torch.equal(scaled_fp8.read(source, "a.weight"), weight.float() * 3)
    norm = MemorySource({"n.weight": weight[0], "n.scale_weight": torch.tensor([1.0])})
    assert torch.equal(scaled_fp8.read(norm, "n.weight"), weight[0])


def test_markers_are_found_by_their_last_part():
    names = ("scaled_fp8", "model.diffusion_model.scaled_fp8", "text_encoders.t5xxl.scaled_fp8", "not_scaled_fp8")
    assert scaled_fp8.markers(names) == names[:3]


def test_names_without_a_scale_are_left_alone():
    names = ("a.weight", "a.bias", "b.scale", "c.weight_scale", "scaled_fp8")
    assert scaled_fp8.find(MemorySource({}), names) == {}


SOUND = {"a.weight": weights(), "a.weight_scale": torch.ones(())}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"a.scale_weight": torch.ones(())}, "2 scales stand beside it"),
        ({"a.weight_scale": torch.ones(5)}, r"\[5\]; \[\] or \[1\] or"),
        ({"a.weight_scale": torch.ones(1, 6)}, r"\[1, 6\]"),
        ({"a.weight_scale": torch.ones(3, 4)}, r"\[3, 4\]"),
        ({"a.weight_scale": torch.tensor(float("nan"))}, "not finite"),
        ({"a.weight_scale": torch.tensor([1.0, 1, float("inf"), 1, 1, 1])}, "not finite"),
        ({"a.weight_scale": torch.ones((), dtype=torch.int32)}, "dtype I32"),
        ({"a.weight_scale": torch.ones((8, 4)).to(torch.float8_e8m0fnu)}, "dtype F8_E8M0"),
        ({"a.weight": weights().view(torch.bool)}, "dtype BOOL"),
        ({"a.weight": weights(shape=(2, 3, 8))}, "a matrix was expected"),
        ({"a.weight": weights(shape=(0, 8))}, "a matrix was expected"),
    ],
)
def test_what_does_not_belong_together_is_refused(change, match):
    with pytest.raises(FileDamagedError, match=match):
        scaled_fp8.read(MemorySource(SOUND | change), "a.weight")


def test_bytes_without_a_description_are_refused():
    with pytest.raises(UnknownStorageError, match="no description"):
        scaled_fp8.read(MemorySource(SOUND | {"a.weight": torch.zeros(4, 4, dtype=torch.uint8)}), "a.weight")


def test_nothing_is_read_before_it_is_known_to_fit():
    source = MemorySource(SOUND | {"a.weight_scale": torch.ones(5)})
    with pytest.raises(FileDamagedError):
        scaled_fp8.read(source, "a.weight")
    assert source.reads == []
