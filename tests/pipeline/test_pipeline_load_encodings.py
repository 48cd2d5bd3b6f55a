"""The embedded model in layouts that round its weights, several tensors a weight.

What a file stands for is worked out by the library that defines the layout or by its formula, and put into the model as
plain float32: the loaded file has to paint the same pixels.
"""

from __future__ import annotations

import json

import bitsandbytes
import bitsandbytes.functional as bnb
import pytest
import torch
from diffusers.quantizers.bfl.utils import dequantize_fp8r, dequantize_nvfp4, quantize_fp8r, quantize_nvfp4
from layout_models import farthest, folder_of, folder_with, is_quantised, paint, painted, transformer
from safetensors.torch import save_file

import checkpoint_writer as writer
import gossamer
from gossamer.demo.embedded import model_folder
from weight_encoders import ENCODERS

pytestmark = pytest.mark.usefixtures("one_thread")

KEPT = {"fp8": "fp8", "fp8 e5m2": "fp8_e5m2", "fp8 by row": "fp8", "int8": "int8", "int8 by row": "int8"}


def fits_all(tensor):
    """Whether a tensor is a matrix of whole tiles and rotations: all linears but the small ones at both ends."""
    return tensor.dim() == 2 and tensor.shape[0] % 128 == 0 and tensor.shape[1] % 256 == 0


def require_pixels(file, values, path, packed, most=0):
    """A loaded file paints what these values, by BFL's names, paint, and keeps its weights in this format."""
    pipe = gossamer.load(file, base="embedded")
    assert pipe.report.packed["single_transformer_blocks.1.attn.to_k"] == packed
    assert pipe.report.packed["norm_out.linear"] == packed
    reference = folder_with(path, "transformer", writer.from_bfl(values, transformer()))
    assert farthest(painted(pipe), paint(reference)) <= most


# comfy_quant ----------------------------------------------------------------------------------------------------------


def comfy_quant(kind):
    """Tensors by BFL's names, descriptions by layer, and what they stand for."""
    tensors, layers, values = {}, {}, {}
    for name, tensor in writer.to_bfl(transformer()).items():
        tensors[name], values[name] = tensor, tensor.float()
        if fits_all(tensor):
            layer = name.removesuffix(".weight")
            layers[layer], stored, values[name] = ENCODERS[kind](tensor.float())
            tensors |= {f"{layer}.{role}": part for role, part in stored.items()}
    return tensors, layers, values


def marker(settings):
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("kind", ENCODERS)
def test_comfy_quant(tmp_path, kind):
    """A marker a layer. Fused weights are cut between q, k and v; the last modulation's halves change places."""
    tensors, layers, values = comfy_quant(kind)
    tensors |= {f"{layer}.comfy_quant": marker(settings) for layer, settings in layers.items()}
    tensors |= {f"{layer}.input_scale": torch.tensor(0.5) for layer in layers}
    file = writer.save(tmp_path / "comfy.safetensors", tensors)
    require_pixels(file, values, tmp_path / "model", KEPT.get(kind, "fp32"))


@pytest.mark.parametrize("kind", ["fp8", "int8 rotated", "nvfp4"])
def test_comfy_quant_in_the_metadata_of_a_file(tmp_path, kind):
    """Its layers are named without the prefix that the tensors have."""
    tensors, layers, values = comfy_quant(kind)
    named = {f"{writer.PREFIX}{name}": tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    file = tmp_path / "comfy.safetensors"
    save_file(named, file, metadata)
    require_pixels(file, values, tmp_path / "model", KEPT.get(kind, "fp32"))


# without a description ------------------------------------------------------------------------------------------------


def nvfp4(weight):
    codes, scale, scale_2 = quantize_nvfp4(weight)
    return {"weight": codes, "weight_scale": scale, "weight_scale_2": scale_2}, dequantize_nvfp4(codes, scale, scale_2)


def fp8_by_row(weight):
    codes, scale = quantize_fp8r(weight)
    return {"weight": codes, "weight_scale": scale}, dequantize_fp8r(codes, scale)


@pytest.mark.parametrize(("encode", "packed"), [(nvfp4, "fp32"), (fp8_by_row, "fp8")])
def test_what_diffusers_quantises_for_black_forest_labs(tmp_path, encode, packed):
    tensors, values = {}, {}
    for name, tensor in writer.to_bfl(transformer()).items():
        tensors[name], values[name] = tensor, tensor.float()
        if tensor.dim() == 2:
            layer = name.removesuffix("weight")
            stored, values[name] = encode(tensor.float())
            tensors |= {f"{layer}{role}": part for role, part in (stored | {"input_scale": torch.ones(())}).items()}
    require_pixels(writer.save(tmp_path / "flux.safetensors", tensors), values, tmp_path / "model", packed)


# bitsandbytes ---------------------------------------------------------------------------------------------------------


def eight_bit(name, weight):
    """A weight as a linear of bitsandbytes saves it, and what it stands for: by the formula, and by bitsandbytes."""
    if not is_quantised(name, weight):
        return {name: weight}, weight, weight
    codes, largest, _ = bnb.int8_vectorwise_quant(weight.half())
    layer = bitsandbytes.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False)
    layer.weight = bitsandbytes.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False)
    layer.weight.CB, layer.weight.SCB = codes, largest
    exact = codes.float() * (largest / 127)[:, None]
    return layer.state_dict(prefix=name.removesuffix("weight")), exact, bnb.int8_vectorwise_dequant(codes, largest)


def test_component_folders_of_bitsandbytes_in_eight_bits(tmp_path):
    """bitsandbytes rounds code times largest value, then that times 1/127; we round twice too, elsewhere: one step."""
    stored, by_formula, by_library = ({part: {} for part in ("transformer", "text_encoder_2")} for _ in range(3))
    for part in stored:
        for name, tensor in writer.read_component(model_folder(), part).items():
            held, by_formula[part][name], by_library[part][name] = eight_bit(name, tensor)
            stored[part] |= held
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    pipe = gossamer.load(folder_of(tmp_path / "int8", stored, config))
    assert pipe.report.packed["transformer_blocks.0.attn.to_q"] == "int8"
    encoder = gossamer.linear_layers(pipe.components["text_encoder_2"])
    assert {layer.packed.format for layer in encoder.values()} == {"int8"}
    pixels = painted(pipe)
    assert farthest(pixels, paint(folder_of(tmp_path / "formula", by_formula))) == 0
    assert farthest(pixels, paint(folder_of(tmp_path / "library", by_library))) <= 1
