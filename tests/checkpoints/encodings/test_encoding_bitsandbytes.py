"""bitsandbytes: what its own layers save is read into the same bytes, and decodes to what it decodes to itself."""

from __future__ import annotations

import json

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional as bnb
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_sources import MemorySource, json_tensor, saved

from gossamer.checkpoints.encodings import bitsandbytes_4bit, bitsandbytes_8bit, find_encoded
from gossamer.errors import FileDamagedError, UnknownStorageError
from gossamer.formats import Packed, unpack

STATE = "a.weight.quant_state.bitsandbytes__"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True, scope="module")
def _eager():
    """bitsandbytes compiles a decoder for each odd number of values, which takes seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield


def quantised(shape, kind, *, nested, dtype=torch.float32, block=64, scale=0.02):
    """Tensors by name as bitsandbytes packs them, and what it decodes them to.

    It decodes them as one row: with AVX-512 its 0.50.2 restarts its blocks at each row of some widths, although blocks
    run on from row to row.
    """
    weight = (torch.randn(shape) * scale).to(dtype)
    codes, state = bnb.quantize_4bit(weight, blocksize=block, quant_type=kind, compress_statistics=nested)
    tensors = {"a.weight": codes, **{f"a.weight.{role}": part for role, part in state.as_dict(packed=True).items()}}
    state.shape = torch.Size((1, weight.numel()))
    return tensors, bnb.dequantize_4bit(codes, state).view(shape)


def dense(found, dtype):
    return unpack(found, dtype) if isinstance(found, Packed) else found.to(dtype)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(48, 64), (9, 33), (130, 256)])
def test_a_saved_state(kind, nested, dtype, shape):
    tensors, decoded = quantised(shape, kind, nested=nested, dtype=dtype)
    source = MemorySource(tensors)
    found = bitsandbytes_4bit.find(source, tensors)
    assert {weight: set(parts) for weight, parts in found.items()} == {"a.weight": set(tensors)}
    packed = bitsandbytes_4bit.read(source, "a.weight")
    assert packed.format == kind + ("-dq" if nested else "")
    assert packed.shape == shape
    assert packed.tensors["codes"].data_ptr() == tensors["a.weight"].data_ptr()
    assert torch.equal(unpack(packed, dtype), decoded)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block", [32, 64, 128, 256, 4096])
def test_every_block_size_keeps_its_numbers(kind, nested, block):
    tensors, decoded = quantised((37, 111), kind, nested=nested, block=block)
    found = bitsandbytes_4bit.read(MemorySource(tensors), "a.weight")
    assert torch.equal(dense(found, torch.float32), decoded)
    if block != 64:
        assert not isinstance(found, Packed) if block < 64 else found.format == kind


@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 200),
    block=st.sampled_from([32, 64, 128, 512]),
    kind=st.sampled_from(["nf4", "fp4"]),
    nested=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(rows, width, block, kind, nested):
    tensors, decoded = quantised((rows, width), kind, nested=nested, block=block)
    found = bitsandbytes_4bit.read(MemorySource(tensors), "a.weight")
    assert torch.equal(dense(found, torch.float32), decoded)


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_type_that_only_carries_the_bytes(dtype):
    tensors, decoded = quantised((48, 64), "nf4", nested=True)
    tensors["a.weight"] = tensors["a.weight"].view(-1).view(dtype).view(-1, 1)
    assert torch.equal(unpack(bitsandbytes_4bit.read(MemorySource(tensors), "a.weight"), torch.float32), decoded)


def state_of(tensors):
    name = next(name for name in tensors if STATE in name)
    return name, json.loads(bytes(tensors[name].tolist()))


def changed(kind="nf4", nested=True, **fields):
    """A sound layer with fields of its JSON replaced."""
    tensors, _ = quantised((48, 64), kind, nested=nested)
    name, state = state_of(tensors)
    return tensors | {name: json_tensor(state | fields)}


def test_block_scales_in_other_groups_or_with_another_map_are_decoded_exactly():
    absmax = torch.rand(48)
    for block, code in ((64, None), (256, torch.linspace(-1, 1, 256)), (128, torch.linspace(-0.9, 1, 256))):
        tensors, _ = quantised((48, 64), "nf4", nested=True)
        codes, state = bnb.quantize_blockwise(absmax - 0.5, code=code, blocksize=block)
        name, described = state_of(tensors)
        tensors |= {
            "a.weight.absmax": codes,
            "a.weight.nested_absmax": state.absmax,
            "a.weight.nested_quant_map": state.code,
            name: json_tensor(described | {"nested_blocksize": block, "nested_offset": 0.5}),
        }
        restored = {key.removeprefix("a.weight."): part for key, part in tensors.items() if key != "a.weight"}
        theirs = bnb.dequantize_4bit(tensors["a.weight"], bnb.QuantState.from_dict(restored, torch.device("cpu")))
        packed = bitsandbytes_4bit.read(MemorySource(tensors), "a.weight")
        assert packed.format == "nf4"
        assert torch.equal(unpack(packed, torch.float32), theirs)


class Small(torch.nn.Module):
    """Layers of both kinds, as diffusers puts them in place of linear layers."""

    def __init__(self, quantisation):
        super().__init__()
        if quantisation == "llm_int8":
            self.proj = bitsandbytes.nn.Linear8bitLt(64, 48, bias=True, has_fp16_weights=False)
        else:
            kind, _, nested = quantisation.partition("-")
            self.proj = bitsandbytes.nn.Linear4bit(
                64, 48, compute_dtype=torch.bfloat16, compress_statistics=bool(nested), quant_type=kind
            )
        self.norm = torch.nn.LayerNorm(48)


@pytest.mark.parametrize("quantisation", ["nf4", "nf4-dq", "fp4", "fp4-dq", "llm_int8"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_what_the_layers_of_bitsandbytes_save(quantisation, prefix, tmp_path):
    model = Small(quantisation).to(torch.float16).to("cpu")
    weight = torch.randn(48, 64).half() * 0.02
    if quantisation == "llm_int8":
        codes, statistics, _ = bnb.int8_vectorwise_quant(weight)
        model.proj.weight = bitsandbytes.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False)
        model.proj.weight.CB, model.proj.weight.SCB = codes, statistics
        theirs = bnb.int8_vectorwise_dequant(codes, statistics)
    else:
        model.proj.weight = bitsandbytes.nn.Params4bit(
            weight, requires_grad=False, quant_type=quantisation[:3], compress_statistics="dq" in quantisation
        ).to("cpu")
        theirs = bnb.dequantize_4bit(model.proj.weight.data, model.proj.weight.quant_state)
    tensors = {prefix + name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    source = saved(tensors, tmp_path / "model.safetensors")
    encoded = find_encoded(source, tensors)
    used = {name for weight in encoded.values() for name in weight.tensors}
    plain = {prefix + name for name in ("proj.bias", "norm.weight", "norm.bias")}
    assert used == set(tensors) - plain
    found = encoded[prefix + "proj.weight"].encoding.read(source, prefix + "proj.weight")
    if quantisation == "llm_int8":
        assert found.format == "int8"
        within_two_roundings(unpack(found, torch.float32), theirs)
    else:
        assert found.format == quantisation
        assert torch.equal(unpack(found, torch.float16), theirs)


def within_two_roundings(ours, theirs):
    """Equal but for the order of operations: each of the two rounds two or three times, by 2^-24 of the value."""
    assert bool(((ours - theirs).abs() <= 5 * 2.0**-24 * theirs.abs()).all())


def test_int8_is_the_exact_product_rounded():
    codes, statistics = torch.randint(-127, 128, (40, 64), dtype=torch.int8), torch.rand(40)
    packed = bitsandbytes_8bit.read(MemorySource({"a.weight": codes, "a.SCB": statistics}), "a.weight")
    exact = codes.double() * statistics.double()[:, None] / 127
    ours = unpack(packed, torch.float32).double()
    assert bool(((ours - exact).abs() <= 2 * 2.0**-24 * exact.abs() * 1.0001).all())
    within_two_roundings(ours.float(), bnb.int8_vectorwise_dequant(codes, statistics))
    assert torch.equal(ours.bfloat16(), bnb.int8_vectorwise_dequant(codes, statistics).bfloat16())


# what is wrong


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"shape": [48, 65]}, r"1536 bytes; \[48, 65\] takes 1560"),
        ({"shape": [2**31, 2**31]}, "that of a matrix"),
        ({"shape": [2**31 - 1, 2**31 - 1]}, "1536 bytes"),
        ({"shape": [0, 64]}, "that of a matrix"),
        ({"shape": [-48, -64]}, "that of a matrix"),
        ({"shape": [3072]}, "that of a matrix"),
        ({"shape": None}, "that of a matrix"),
        ({"shape": [48.0, 64]}, "that of a matrix"),
        ({"shape": [True, 3072]}, "that of a matrix"),
        ({"blocksize": 0}, "blocksize is 0"),
        ({"blocksize": -64}, "blocksize is -64"),
        ({"blocksize": 2**62}, "blocksize is 46"),
        ({"blocksize": "64"}, "blocksize is 64"),
        ({"blocksize": 128}, r"\[48\]; \[24\] or"),
        ({"nested_blocksize": 0}, "nested_blocksize is 0"),
        ({"nested_blocksize": None}, "nested_blocksize is None"),
        ({"nested_offset": "x"}, "nested_offset"),
        ({"nested_offset": 1e300}, "nested_offset"),
        ({"quant_type": "fp4"}, "says 'fp4' under the name of nf4"),
        ({"quant_type": ["nf4"]}, "under the name of nf4"),
    ],
)
def test_a_quant_state_that_lies_is_refused(fields, match):
    source = MemorySource(changed(**fields))
    with pytest.raises(FileDamagedError, match=match) as caught:
        bitsandbytes_4bit.read(source, "a.weight")
    assert all((caught.value.what, caught.value.why, caught.value.next_step))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"{" + b" " * 70_000 + b"}", "at most 65536 bytes"),
        (b'{"nested_offset": Infinity}', "Infinity is not a number"),
        (b'{"shape": [1' + b"0" * 5000 + b"]}", "Exceeds the limit"),
        (b'{"a":' * 12_000, "nested too deeply"),
        (b"null", "not an object"),
    ],
)
def test_a_quant_state_that_is_no_sound_json_is_refused(text, match):
    tensors, _ = quantised((48, 64), "nf4", nested=True)
    tensors[STATE + "nf4"] = json_tensor(text)
    with pytest.raises(FileDamagedError, match=match):
        bitsandbytes_4bit.read(MemorySource(tensors), "a.weight")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"a.weight.absmax": torch.zeros(47, dtype=torch.uint8)}, r"\[47\]; \[48\]"),
        ({"a.weight.absmax": torch.zeros(48)}, "dtype F32; U8"),
        ({"a.weight.nested_absmax": torch.zeros(2)}, r"\[2\]; \[1\]"),
        ({"a.weight.nested_absmax": torch.tensor([float("nan")])}, "not finite"),
        ({"a.weight.nested_quant_map": torch.zeros(255)}, r"\[255\]"),
        ({"a.weight.quant_map": torch.zeros(17)}, r"\[17\]"),
        ({"a.weight": torch.zeros(1535, 1, dtype=torch.uint8)}, "1535 bytes"),
        ({"a.weight": torch.zeros(1536, dtype=torch.bool)}, "dtype BOOL"),
        ({STATE + "fp4": json_tensor({})}, "2 tensors describe"),
        ({STATE + "nf4": torch.zeros(3)}, "dtype F32"),
    ],
)
def test_tensors_that_lie_are_refused(change, match):
    tensors, _ = quantised((48, 64), "nf4", nested=True)
    with pytest.raises(FileDamagedError, match=match):
        bitsandbytes_4bit.read(MemorySource(tensors | change), "a.weight")


def test_scales_that_are_not_finite_are_refused():
    tensors, _ = quantised((48, 64), "nf4", nested=False)
    tensors["a.weight.absmax"][3] = float("inf")
    with pytest.raises(FileDamagedError, match="not finite"):
        bitsandbytes_4bit.read(MemorySource(tensors), "a.weight")


@pytest.mark.parametrize("role", ["absmax", "quant_map", "nested_quant_map"])
def test_a_missing_tensor(role):
    tensors, _ = quantised((48, 64), "nf4", nested=True)
    del tensors[f"a.weight.{role}"]
    with pytest.raises(FileDamagedError, match=f"{role}' that belongs to it is missing"):
        bitsandbytes_4bit.read(MemorySource(tensors), "a.weight")


def test_other_values_than_the_standard_ones_are_refused():
    tensors, _ = quantised((48, 64), "nf4", nested=False)
    tensors["a.weight.quant_map"] = torch.linspace(-1, 1, 16)
    with pytest.raises(UnknownStorageError, match="nf4 with other values"):
        bitsandbytes_4bit.read(MemorySource(tensors), "a.weight")
    with pytest.raises(UnknownStorageError, match="block scales of type 'float16'"):
        bitsandbytes_4bit.read(MemorySource(changed(nested_dtype="float16")), "a.weight")


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"a.SCB": torch.ones(39)}, FileDamagedError, r"\[39\]; \[40\]"),
        ({"a.SCB": torch.full((40,), float("nan"))}, FileDamagedError, "not finite"),
        ({"a.weight": torch.zeros(40, 64)}, FileDamagedError, "dtype F32; I8"),
        ({"a.weight_format": torch.tensor(2, dtype=torch.uint8)}, UnknownStorageError, "in the order 2"),
        ({"a.weight_format": torch.zeros(2, dtype=torch.uint8)}, FileDamagedError, r"\[2\]"),
    ],
)
def test_int8_that_lies_is_refused(change, error, match):
    tensors = {"a.weight": torch.zeros(40, 64, dtype=torch.int8), "a.SCB": torch.ones(40)}
    tensors["a.weight_format"] = torch.tensor(0, dtype=torch.uint8)
    with pytest.raises(error, match=match):
        bitsandbytes_8bit.read(MemorySource(tensors | change), "a.weight")
