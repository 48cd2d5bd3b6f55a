"""comfy_quant: weights that comfy-kitchen quantised come back as its eager backend decodes them."""

from __future__ import annotations

import base64
import hashlib
import json
import tracemalloc
import zlib
from pathlib import Path

import pytest
import torch
from tensor_sources import DTYPES, MemorySource, json_tensor, saved

from gossamer.checkpoints.encodings import comfy_quant
from gossamer.checkpoints.encodings.hadamard import is_rotation_size, rotate_unscaled, rotation_factor
from gossamer.errors import FileDamagedError, UnknownStorageError
from gossamer.formats import Packed, unpack

GOLDEN = json.loads(Path(__file__).with_name("golden_comfy_kitchen.json").read_text())["cases"]
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
KEPT = {"fp8": "fp8", "int8 by tensor": "int8", "int8 by row": "int8"}


def decode(content):
    data = bytearray(zlib.decompress(base64.b64decode(content["data"])))
    return torch.frombuffer(data, dtype=torch.uint8).view(TORCH_DTYPES[content["dtype"]]).view(content["shape"])


def golden(name, prefix="a."):
    return {prefix + role: decode(content) for role, content in GOLDEN[name]["tensors"].items()}


def layer(name, settings=None, **more):
    """A golden layer with its marker; tensors given by role are replaced, or left out where None."""
    marker = json_tensor(GOLDEN[name]["settings"] if settings is None else settings)
    tensors = golden(name) | {"a.comfy_quant": marker} | {f"a.{role}": tensor for role, tensor in more.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def dense(found):
    return unpack(found, torch.float32) if isinstance(found, Packed) else found


def require_golden(found, case):
    weight = dense(found)
    assert weight.dtype == torch.float32
    if "sha256" in case:
        assert hashlib.sha256(weight.numpy().tobytes()).hexdigest() == case["sha256"]
    else:
        # theirs adds float32 in some order, ours rounds once: at most the rounding of a sum of a group
        theirs = decode(case["decoded"])
        torch.testing.assert_close(weight, theirs, rtol=0, atol=float(theirs.abs().max()) * 2e-6)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_same_numbers_as_comfy_kitchen(name):
    tensors = layer(name, input_scale=torch.ones(()))
    source = MemorySource(tensors)
    assert {key: set(value) for key, value in comfy_quant.find(source, tensors).items()} == {"a.weight": set(tensors)}
    found = comfy_quant.read(source, "a.weight")
    require_golden(found, GOLDEN[name])
    assert (found.format if isinstance(found, Packed) else None) == KEPT.get(name)


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("described", ["a", "bare"])
def test_the_same_from_the_metadata_of_a_file(name, described, tmp_path):
    prefix = "a." if described == "a" else "model.diffusion_model.a."
    metadata = {"format_version": "1.0", "layers": {"a": GOLDEN[name]["settings"], "absent": {"format": "nvfp4"}}}
    tensors = golden(name, prefix) | {prefix + "bias": torch.zeros(3)}
    source = saved(tensors, tmp_path / "a.safetensors", {"_quantization_metadata": json.dumps(metadata)})
    found = comfy_quant.find(source, tensors)
    assert {key: set(value) for key, value in found.items()} == {prefix + "weight": set(tensors) - {prefix + "bias"}}
    require_golden(comfy_quant.read(source, prefix + "weight"), GOLDEN[name])


def test_nothing_is_copied_where_the_numbers_are_kept():
    tensors = layer("int8 by row")
    packed = comfy_quant.read(MemorySource(tensors), "a.weight")
    assert packed.tensors["codes"].data_ptr() == tensors["a.weight"].data_ptr()


def test_e5m2_and_rows_by_name():
    codes, scale = torch.randn(6, 8).to(torch.float8_e5m2), torch.rand(6)
    tensors = {"a.weight": codes, "a.weight_scale": scale, "a.comfy_quant": json_tensor({"format": "float8_e5m2"})}
    found = comfy_quant.read(MemorySource(tensors), "a.weight")
    assert found.format == "fp8_e5m2"
    assert torch.equal(dense(found), codes.float() * scale[:, None])
    tensors |= {"a.weight": codes.float().to(torch.float8_e4m3fn)}
    tensors["a.comfy_quant"] = json_tensor({"format": "float8_e4m3fn_rowwise", "full_precision_matrix_mult": True})
    assert comfy_quant.read(MemorySource(tensors), "a.weight").format == "fp8"


@pytest.mark.parametrize(
    ("name", "dtype"), [("float8_e4m3fn_blockwise", torch.float8_e4m3fn), ("int8_blockwise", torch.int8)]
)
@pytest.mark.parametrize("nested", [False, True])
def test_square_tiles(name, dtype, nested):
    codes, scale = (torch.randn(12, 8) * 20).to(dtype), torch.rand(3, 2)
    settings = {"format": name, "params": {"group_size": 4}} if nested else {"format": name, "group_size": 4}
    tensors = {"a.weight": codes, "a.weight_scale": scale, "a.comfy_quant": json_tensor(settings)}
    found = comfy_quant.read(MemorySource(tensors), "a.weight")
    assert torch.equal(found, codes.float() * torch.kron(scale, torch.ones(4, 4)))


@pytest.mark.parametrize("name", ["fp8", "nvfp4", "int8 rotated"])
def test_an_input_scale_is_multiplied_into_the_columns(name):
    plain = dense(comfy_quant.read(MemorySource(layer(name)), "a.weight"))
    scale = torch.rand(plain.shape[1]).half()
    found = comfy_quant.read(MemorySource(layer(name, pre_quant_scale=scale)), "a.weight")
    assert torch.equal(found, plain * scale.float())


def test_scales_stored_as_bytes_or_as_one_line():
    for name in ("nvfp4", "mxfp8"):
        scale = golden(name)["a.weight_scale"].view(torch.uint8).reshape(-1)
        require_golden(comfy_quant.read(MemorySource(layer(name, weight_scale=scale)), "a.weight"), GOLDEN[name])


# the rotation


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_the_rotation_is_a_regular_hadamard_matrix_and_its_own_inverse(size):
    matrix = rotate_unscaled(torch.eye(size), size)
    assert set(matrix.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(matrix, matrix.T)
    assert matrix.sum(0).unique().tolist() == [size**0.5]
    assert torch.equal(matrix @ matrix, size * torch.eye(size))
    assert rotation_factor(size) == size**-0.5


def test_sizes_of_rotations():
    assert [size for size in range(1, 2000) if is_rotation_size(size)] == [4, 16, 64, 256, 1024]


# what is wrong


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"format": "int3_magic"}, "int3_magic"),
        ({"format": "hybrid_mxfp8"}, "Gossamer reads float8_e4m3fn, "),
        ({"format": "float8_e4m3fn", "convrot": True}, "float8_e4m3fn with convrot"),
        ({"format": "float8_e4m3fn", "shuffled": 3}, "with shuffled"),
        ({"format": "float8_e4m3fn", "params": {"shuffled": 3}}, "with shuffled"),
    ],
)
def test_an_unknown_format_or_setting_is_named(settings, match):
    with pytest.raises(UnknownStorageError, match=match) as caught:
        comfy_quant.read(MemorySource(layer("fp8", settings)), "a.weight")
    assert all((caught.value.what, caught.value.why, caught.value.next_step))


def test_a_tensor_that_the_format_does_not_use_is_named():
    source = MemorySource(layer("fp8", weight_scale_2=torch.ones(())))
    with pytest.raises(UnknownStorageError, match=r"with a\.weight_scale_2"):
        comfy_quant.read(source, "a.weight")


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("fp8", b"", "Expecting value"),
        ("fp8", b"\xff\xfe{", "codec can't decode"),
        ("fp8", b"[1]", "not an object"),
        ("fp8", b'{"format": "nvfp4", "format": "mxfp8"}', "appears twice"),
        ("fp8", b'{"format": NaN}', "NaN is not a number"),
        ("fp8", b"[" * 50_000, "nested too deeply"),
        ("fp8", b'{"format": "' + b"x" * 70_000, "at most 65536 bytes"),
        ("fp8", {}, "names no format"),
        ("fp8", {"format": 3}, "names no format"),
        ("fp8", {"format": ["nvfp4"]}, "names no format"),
        ("int8 rotated", {"format": "int8_tensorwise", "convrot": "yes"}, "neither true nor false"),
        ("int8 rotated", {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 0}, "whole number from 1"),
        ("int8 rotated", {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 2**70}, "whole number"),
        ("int8 rotated", {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64.0}, "whole number"),
        ("int8 rotated", {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 32}, "power of four"),
        ("int8 rotated", {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 4**12}, "power of four"),
        ("w4a8", {"format": "asym_w4a8_int8", "convrot_groupsize": 64, "group_size": 3}, "no multiple of the group"),
        ("w4a8", {"format": "asym_w4a8_int8", "convrot_groupsize": 64, "group_size": 32}, r"\[8, 8\]; \[8, 4\] was"),
        ("awq", {"format": "awq_w4a16", "group_size": 5}, "no multiple of the group"),
        ("awq", {"format": "awq_w4a16", "group_size": 32}, r"\[2, 24\]; \[4, 24\] was expected"),
        ("nvfp4", {"format": "nvfp4", "group_size": 32}, "this format has 16"),
        ("nvfp4", {"format": "nvfp4", "orig_shape": [144]}, "orig_shape"),
        ("nvfp4", {"format": "nvfp4", "orig_shape": [145, 80]}, "orig_shape"),
        ("nvfp4", {"format": "nvfp4", "orig_shape": [1, 1]}, "orig_shape"),
        ("nvfp4", {"format": "nvfp4", "orig_shape": [0, 80]}, "orig_shape"),
        ("nvfp4", {"format": "nvfp4", "orig_shape": ["144", 80]}, "orig_shape"),
        ("fp8", {"format": "int8_tensorwise"}, "dtype F8_E4M3; I8"),
        ("fp8", {"format": "nvfp4"}, "dtype F8_E4M3; U8"),
        ("fp8", {"format": "float8_e4m3fn_blockwise", "group_size": 5}, "no multiples of the group"),
    ],
)
def test_a_description_that_lies_is_refused(name, settings, match):
    with pytest.raises(FileDamagedError, match=match) as caught:
        comfy_quant.read(MemorySource(layer(name, settings)), "a.weight")
    assert all((caught.value.what, caught.value.why, caught.value.next_step))


E8M0_NAN = torch.full((256, 8), 255, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("nvfp4", {"weight_scale": torch.ones(144, 5).to(torch.float8_e4m3fn)}, r"\[144, 5\]; \[256, 8\]"),
        ("nvfp4", {"weight_scale_2": None}, "is missing"),
        ("nvfp4", {"weight_scale": torch.full((256, 8), float("nan")).to(torch.float8_e4m3fn)}, "not finite"),
        ("mxfp8", {"weight_scale": E8M0_NAN}, "not finite"),
        ("mxfp8", {"weight": torch.zeros(160, 100).to(torch.float8_e4m3fn)}, "100 columns"),
        ("w4a8", {"weight_s_channel": torch.ones(9)}, r"\[9\]"),
        ("w4a8", {"weight_codebook": torch.ones(15)}, r"\[15\]"),
        ("w4a8", {"weight_codebook": torch.full((16,), float("nan"))}, "not finite"),
        ("w4a8", {"weight_s_rel": torch.full((8, 8), 127, dtype=torch.uint8)}, "not finite"),
        ("w4a8 asymmetric", {"weight_correction": torch.ones(8, 9)}, r"\[8, 9\]"),
        ("fp8", {"comfy_quant": torch.zeros(2, 2, dtype=torch.uint8)}, r"the shape \[2, 2\]"),
        ("fp8", {"comfy_quant": torch.zeros(2)}, "dtype F32"),
        ("fp8", {"weight_scale": None}, "is missing"),
    ],
)
def test_tensors_that_lie_are_refused(name, change, match):
    with pytest.raises(FileDamagedError, match=match):
        comfy_quant.read(MemorySource(layer(name, **change)), "a.weight")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "Expecting value"),
        ("{}", "no table of layers"),
        ('{"layers": []}', "no table of layers"),
        ('{"layers": ' + "[" * 100_000, "nested too deeply"),
        ('{"layers": {' + "0" * (10 << 20), "at most 1048576 are allowed"),
    ],
)
def test_metadata_that_lies_is_refused(text, match):
    source = MemorySource(golden("fp8"), {"_quantization_metadata": text})
    for ask in (lambda: comfy_quant.find(source, source.entries), lambda: comfy_quant.read(source, "a.weight")):
        with pytest.raises(FileDamagedError, match=match):
            ask()


def test_a_layer_that_is_no_object():
    source = MemorySource(golden("fp8"), {"_quantization_metadata": '{"layers": {"a": "nvfp4"}}'})
    with pytest.raises(FileDamagedError, match="not an object"):
        comfy_quant.read(source, "a.weight")


def test_two_descriptions():
    same = json.dumps({"layers": {"a": GOLDEN["fp8"]["settings"]}})
    require_golden(
        comfy_quant.read(MemorySource(layer("fp8"), {"_quantization_metadata": same}), "a.weight"), GOLDEN["fp8"]
    )
    other = json.dumps({"layers": {"a": {"format": "float8_e5m2"}}})
    with pytest.raises(FileDamagedError, match="describe it differently"):
        comfy_quant.read(MemorySource(layer("fp8"), {"_quantization_metadata": other}), "a.weight")


def test_metadata_as_long_as_allowed_takes_little_memory():
    text = '{"layers": {}, "x": [' + ",".join(["{}"] * 349_000) + "]}"
    source = MemorySource(golden("fp8"), {"_quantization_metadata": text})
    tracemalloc.start()
    assert comfy_quant.find(source, source.entries) == {}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6
