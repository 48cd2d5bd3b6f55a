"""All encodings together: each tensor belongs to one weight, and what nothing uses is left over."""

from __future__ import annotations

import itertools

import pytest
import torch
from bitsandbytes import functional as bnb
from diffusers.quantizers.bfl.utils import quantize_fp8r, quantize_nvfp4
from tensor_sources import MemorySource, json_tensor

from gossamer.checkpoints.encodings import ENCODINGS, find_encoded, markers, read_encoded
from gossamer.formats import Packed


def four_bit():
    codes, state = bnb.quantize_4bit(torch.randn(48, 64), blocksize=64, quant_type="nf4", compress_statistics=True)
    return {"weight": codes, **{f"weight.{role}": part for role, part in state.as_dict(packed=True).items()}}


def eight_bit():
    codes, statistics, _ = bnb.int8_vectorwise_quant(torch.randn(48, 64).half())
    return {"weight": codes, "SCB": statistics, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def described():
    codes, scale = quantize_fp8r(torch.randn(48, 64))
    marker = json_tensor({"format": "float8_e4m3fn"})
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.ones(()), "comfy_quant": marker}


def blocks():
    codes, scale, scale_2 = quantize_nvfp4(torch.randn(48, 64))
    return {"weight": codes, "weight_scale": scale, "weight_scale_2": scale_2, "input_scale": torch.ones(())}


def rows():
    codes, scale = quantize_fp8r(torch.randn(48, 64))
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.ones(())}


def one_scale():
    return {"weight": torch.randn(48, 64).to(torch.float8_e4m3fn), "scale_weight": torch.ones(())} | {
        "scale_input": torch.ones(())
    }


LAYERS = {
    "bitsandbytes 4-bit": four_bit,
    "bitsandbytes 8-bit": eight_bit,
    "comfy_quant": described,
    "nvfp4": blocks,
    "scaled fp8": rows,
}
PLAIN = ("bias", "norm.scale", "plain.weight", "scaled_fp8")


def checkpoint():
    """A file in which every encoding occurs twice, with and without the usual prefix, and plain tensors between."""
    tensors = {}
    for make, prefix in itertools.product((*LAYERS.values(), one_scale), ("", "model.x.")):
        layer = f"{prefix}{make.__name__}."
        tensors |= {layer + role: tensor for role, tensor in make().items()}
        tensors |= {layer + role: torch.zeros(3) for role in PLAIN}
    return tensors


def test_every_tensor_belongs_to_one_weight_and_the_rest_is_left():
    tensors = checkpoint()
    source = MemorySource(tensors)
    encoded = find_encoded(source, tensors)
    assert len(encoded) == 12
    claimed = [name for weight in encoded.values() for name in weight.tensors]
    assert len(claimed) == len(set(claimed))
    assert all(weight.tensors[0] == weight.name == name for name, weight in encoded.items())
    left = set(tensors) - set(claimed)
    assert {name.rpartition(".")[2] for name in left} == {"bias", "scale", "weight", "scaled_fp8"}
    assert len(left) == len(PLAIN) * 12
    assert set(markers(tensors)) == {name for name in left if name.endswith("scaled_fp8")}
    for weight in encoded.values():
        found = read_encoded(source, weight)
        assert tuple(found.shape) == (48, 64)
        assert isinstance(found, Packed) or (weight.encoding.name == "nvfp4" and found.dtype == torch.float32)


@pytest.mark.parametrize(("name", "make"), LAYERS.items())
def test_each_encoding_is_found_by_its_own_name(name, make):
    tensors = {f"a.{role}": tensor for role, tensor in make().items()}
    (weight,) = find_encoded(MemorySource(tensors), tensors).values()
    assert weight.encoding.name == name
    assert set(weight.tensors) == set(tensors)


def test_no_encoding_is_asked_about_what_another_one_has():
    tensors = checkpoint()
    source = MemorySource(tensors)
    encoded = find_encoded(source, tensors)
    for encoding in ENCODINGS:
        others = [name for weight in encoded.values() if weight.encoding != encoding for name in weight.tensors]
        own = [name for weight in encoded.values() if weight.encoding == encoding for name in weight.tensors]
        assert not {
            name for parts in encoding.find(source, set(tensors) - set(others)).values() for name in parts
        } - set(own)


def test_only_names_that_are_asked_for_are_claimed():
    tensors = checkpoint()
    asked = [name for name in tensors if name.startswith("model.x.")]
    encoded = find_encoded(MemorySource(tensors), asked)
    assert len(encoded) == 6
    assert all(name.startswith("model.x.") for weight in encoded.values() for name in weight.tensors)


def test_leftovers_of_every_kind_stay_left():
    alone = ("a.weight_scale", "b.comfy_quant", "c.SCB", "d.weight.absmax", "e.weight_scale_2", "f.scale_weight")
    state = "g.weight.quant_state.bitsandbytes__nf4"
    tensors = {name: torch.zeros((), dtype=torch.uint8) for name in (*alone, state)}
    assert find_encoded(MemorySource(tensors), tensors) == {}


def test_finding_reads_no_tensor():
    tensors = checkpoint()
    source = MemorySource(tensors)
    find_encoded(source, tensors)
    assert source.reads == []
