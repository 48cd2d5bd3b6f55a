"""Changes besides weights: differences of norms and biases, in the transformer and in both text encoders."""

from __future__ import annotations

import copy

import pytest
import torch
import wild
from safetensors.torch import save_file
from test_text_encoders import TOKENS, new_encoders

from gossamer.adapters import attach, attached, detach, read_adapter, set_scale, write_adapter
from gossamer.adapters.spelling import recognise
from gossamer.errors import AdapterError, WrongModelError
from gossamer.models.flux_spec import FluxSpec, norm_shapes
from gossamer.models.swap import linear_layers, quantize

FULL = FluxSpec(19, 38, 24, 128, 64, 64, 4096, 768, True)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
NORM = "transformer_blocks.0.attn.norm_added_k.weight"

# one norm, as every tool that writes differences spells it
SPELLED = [
    "diffusion_model.double_blocks.0.txt_attn.norm.key_norm.diff",
    "diffusion_model.double_blocks.0.txt_attn.norm.key_norm.scale.diff",
    "double_blocks.0.txt_attn.norm.key_norm.diff",
    "transformer.transformer_blocks.0.attn.norm_added_k.diff",
    "lycoris_transformer_blocks_0_attn_norm_added_k.w_norm",
    "lora_transformer_transformer_blocks_0_attn_norm_added_k.w_norm",
    "lora_unet_double_blocks_0_txt_attn_norm_key_norm.w_norm",
    "lora_unet_double_blocks_0_txt_attn_norm_key_norm.diff",
]


@pytest.fixture
def file_of(tmp_path):
    def write(tensors):
        save_file(tensors, tmp_path / "norms.safetensors")
        return tmp_path / "norms.safetensors"

    return write


@pytest.mark.parametrize("key", SPELLED)
def test_a_norm_in_every_spelling(key, file_of, quantized, spec):
    difference = torch.linspace(-0.5, 0.5, 32)
    adapter = read_adapter(file_of({key: difference}), spec)
    model = quantized()
    original = model.get_parameter(NORM)
    attach(model, adapter, "style", 0.5)
    torch.testing.assert_close(model.get_parameter(NORM).data, original.data + 0.5 * difference)
    set_scale(model, "style", 2.0)
    torch.testing.assert_close(model.get_parameter(NORM).data, original.data + 2 * difference)
    detach(model, "style")
    assert model.get_parameter(NORM) is original


def test_all_norms_of_a_full_size_extract():
    """The list of norms is typed here: query and key of each stream of 19 blocks, and of 38 single ones."""
    keys = [
        f"diffusion_model.double_blocks.{i}.{stream}_attn.norm.{part}_norm.diff"
        for i in range(19)
        for stream in ("img", "txt")
        for part in ("query", "key")
    ]
    keys += [f"diffusion_model.single_blocks.{i}.norm.{part}_norm.diff" for i in range(38) for part in ("query", "key")]
    found = recognise(keys, FULL)
    assert found.left_over == ()
    assert found.changed_norms["transformer"].keys() == norm_shapes(FULL).keys()


def test_differences_add_up_and_act_on_replacements(file_of, quantized, make_adapter, spec):
    """In any order of coming and going."""
    first = read_adapter(file_of({SPELLED[0]: torch.full((32,), 0.25)}), spec)
    second = read_adapter(file_of({SPELLED[4]: torch.full((32,), -1.0)}), spec)
    replacing = make_adapter(lambda name: False, norms=True)
    model = quantized()
    original = model.get_parameter(NORM)
    attach(model, first, "first")
    attach(model, replacing, "replacing")
    attach(model, second, "second", 0.5)
    there = replacing.replacements[NORM]
    torch.testing.assert_close(model.get_parameter(NORM).data, there - 0.25)
    detach(model, "first")
    torch.testing.assert_close(model.get_parameter(NORM).data, there - 0.5)
    detach(model, "replacing")
    torch.testing.assert_close(model.get_parameter(NORM).data, original.data - 0.5)
    detach(model, "second")
    assert model.get_parameter(NORM) is original
    assert not attached(model)


def test_a_norm_of_another_size(file_of, spec):
    with pytest.raises(WrongModelError, match=r"norm_added_k[\s\S]*\(31,\)"):
        read_adapter(file_of({SPELLED[0]: torch.ones(31)}), spec)


def test_the_norms_of_a_copied_model_are_its_own(file_of, quantized, spec):
    adapter = read_adapter(file_of({SPELLED[0]: torch.ones(32)}), spec)
    model = quantized("nf4")
    attach(model, adapter, "style")
    twin = copy.deepcopy(model)
    detach(model, "style")
    assert torch.equal(twin.get_parameter(NORM), model.get_parameter(NORM) + 1)
    detach(twin, "style")
    assert torch.equal(twin.get_parameter(NORM), model.get_parameter(NORM))


# biases ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [None, 1.0, 0.0])
def test_a_difference_of_a_bias_beside_factors_is_not_scaled_by_alpha(alpha, file_of, quantized, spec):
    generator = torch.Generator().manual_seed(1)
    down, up, bias = (torch.randn(*shape, generator=generator) for shape in ((2, 256), (768, 2), (768,)))
    stem = "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.diff_b": bias}
    tensors |= {} if alpha is None else {f"{stem}.alpha": torch.tensor(alpha)}
    model = quantized()
    layers = [linear_layers(model)[f"transformer_blocks.0.attn.to_{part}"] for part in "qkv"]
    weights, biases = [layer.effective_weight().clone() for layer in layers], [layer.bias.clone() for layer in layers]
    attach(model, read_adapter(file_of(tensors), spec), "extract", 0.5)
    delta = up @ down * (1.0 if alpha is None else alpha / 2)
    for part, (layer, weight, own) in enumerate(zip(layers, weights, biases, strict=True)):
        rows = slice(256 * part, 256 * (part + 1))
        torch.testing.assert_close(layer.effective_weight(), weight + 0.5 * delta[rows], **CLOSE)
        torch.testing.assert_close(layer.effective_bias(), own + 0.5 * bias[rows], **CLOSE)


def test_a_bias_alone_changes_no_weight(file_of, quantized, spec):
    tensors = {
        "lora_unet_single_blocks_0_linear1.diff_b": torch.arange(7 * 256.0),
        "lora_unet_single_blocks_0_linear1.alpha": torch.tensor(4.0),
    }
    adapter = read_adapter(file_of(tensors), spec)
    assert list(adapter.unused) == ["lora_unet_single_blocks_0_linear1.alpha"]
    model = quantized("nf4")
    layer = linear_layers(model)["single_transformer_blocks.0.proj_mlp"]
    weight, bias = layer.effective_weight().clone(), layer.bias.clone()
    attach(model, adapter, "bias")
    assert torch.equal(layer.effective_weight(), weight)
    torch.testing.assert_close(layer.effective_bias(), bias + torch.arange(768.0, 7 * 256.0))
    assert attached(model)["bias"].cost.reason == ""


def test_the_final_modulation_has_its_bias_in_the_other_order(file_of, quantized, spec):
    tensors = {"diffusion_model.final_layer.adaLN_modulation.1.diff_b": torch.arange(512.0)}
    model = quantized()
    layer = linear_layers(model)["norm_out.linear"]
    bias = layer.bias.clone()
    attach(model, read_adapter(file_of(tensors), spec), "bias")
    change = torch.cat([torch.arange(256.0, 512.0), torch.arange(256.0)])
    torch.testing.assert_close(layer.effective_bias() - bias, change, rtol=1e-4, atol=1e-4)


# text encoders --------------------------------------------------------------------------------------------------------

CLIP_LAYER, T5_BLOCK = "text_model.encoder.layers.1", "encoder.block.1"
TEXT_FILES = {
    "ComfyUI": ("text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer.", str, "diff", "diff_b"),
    "LyCORIS": ("lora_te1_", "lora_te2_", lambda name: name.replace(".", "_"), "w_norm", "b_norm"),
    "LyCORIS, kohya's count": ("lora_te1_", "lora_te3_", lambda name: name.replace(".", "_"), "w_norm", "b_norm"),
    "diffusers": ("text_encoder.", "text_encoder_2.", str, "diff", "diff_b"),
}


@torch.inference_mode()
def encode(models):
    return [model(TOKENS).last_hidden_state for model in models.values()]


def text_file(name):
    """Every family once for CLIP and for T5: differences of norms, a LoKr, a LoHa, a DoRA and a whole matrix."""
    clip, t5, spell, weight, bias = TEXT_FILES[name]
    generator = torch.Generator().manual_seed(2)

    def random(*shape):
        return torch.randn(*shape, generator=generator) * 0.2

    tensors = {
        clip + spell(f"{CLIP_LAYER}.layer_norm1") + f".{weight}": random(64),
        clip + spell(f"{CLIP_LAYER}.layer_norm2") + f".{bias}": random(64),
        clip + spell("text_model.final_layer_norm") + f".{bias}": random(64),
        t5 + spell(f"{T5_BLOCK}.layer.1.layer_norm") + f".{weight}": random(64),
        t5 + spell("encoder.final_layer_norm") + f".{weight}": random(64),
        clip + spell(f"{CLIP_LAYER}.self_attn.q_proj") + ".lokr_w1": random(4, 4),
        clip + spell(f"{CLIP_LAYER}.self_attn.q_proj") + ".lokr_w2": random(16, 16),
        clip + spell(f"{CLIP_LAYER}.mlp.fc1") + ".diff": random(256, 64),
        clip + spell(f"{CLIP_LAYER}.mlp.fc1") + ".diff_b": random(256),
        t5 + spell(f"{T5_BLOCK}.layer.1.DenseReluDense.wo") + ".lora_down.weight": random(2, 96),
        t5 + spell(f"{T5_BLOCK}.layer.1.DenseReluDense.wo") + ".lora_up.weight": random(64, 2),
        t5 + spell(f"{T5_BLOCK}.layer.1.DenseReluDense.wo") + ".dora_scale": 1 + random(64, 1),
    }
    stem = t5 + spell(f"{T5_BLOCK}.layer.0.SelfAttention.k")
    for side in "12":
        tensors |= {f"{stem}.hada_w{side}_a": random(32, 2), f"{stem}.hada_w{side}_b": random(2, 64)}
    return tensors


def changed_encoders(name):
    """Plain encoders with the file's changes in their weights."""
    models, values = new_encoders(), list(text_file(name).values())
    (norm1, norm2, last, t5_norm, t5_last, left, right, whole, bias, down, up, magnitude, a, b, c, d) = values
    clip, t5 = models["text_encoder"], models["text_encoder_2"]
    names = {name.removeprefix("text_model."): part for name, part in clip.named_modules()}
    layer = names["encoder.layers.1"]
    layer.layer_norm1.weight += norm1
    layer.layer_norm2.bias += norm2
    names["final_layer_norm"].bias += last
    layer.self_attn.q_proj.weight += torch.kron(left, right)
    layer.mlp.fc1.weight += whole
    layer.mlp.fc1.bias += bias
    block = t5.encoder.block[1]
    block.layer[1].layer_norm.weight += t5_norm
    t5.encoder.final_layer_norm.weight += t5_last
    wo = block.layer[1].DenseReluDense.wo.weight
    summed = wo + up @ down
    wo.copy_(magnitude * summed / summed.norm(dim=1, keepdim=True))
    block.layer[0].SelfAttention.k.weight += (a @ b) * (c @ d)
    return models


@pytest.mark.parametrize("name", TEXT_FILES)
def test_every_family_in_text_encoders(name, file_of, quantized, spec):
    adapter = read_adapter(file_of(text_file(name)), spec)
    assert not adapter.unused
    encoders = new_encoders()
    for encoder in encoders.values():
        quantize(encoder, "fp32")
    before = encode(encoders)
    parameters = [id(parameter) for encoder in encoders.values() for parameter in encoder.parameters()]
    model = quantized()
    with pytest.raises(AdapterError, match="text_encoder"):
        attach(model, adapter, "text")
    attach(model, adapter, "text", 1.0, encoders)
    for ours, theirs in zip(encode(encoders), encode(changed_encoders(name)), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    set_scale(model, "text", 0.0, encoders)
    for ours, plain in zip(encode(encoders), before, strict=True):
        assert torch.equal(ours, plain)
    detach(model, "text", encoders)
    assert parameters == [id(parameter) for encoder in encoders.values() for parameter in encoder.parameters()]


@pytest.mark.parametrize("spelling", ["diffusers", "kohya"])
def test_text_encoder_families_are_written(spelling, file_of, quantized, spec, tmp_path):
    adapter = read_adapter(file_of(text_file("ComfyUI")), spec)
    write_adapter(adapter, tmp_path / "again.safetensors", spelling)
    encoders = new_encoders()
    for encoder in encoders.values():
        quantize(encoder, "fp32")
    attach(quantized(), read_adapter(tmp_path / "again.safetensors", spec), "text", 1.0, encoders)
    for ours, theirs in zip(encode(encoders), encode(changed_encoders("ComfyUI")), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_norms_that_a_text_encoder_does_not_have(file_of, quantized, spec):
    encoders = new_encoders()
    deep = {"text_encoder.text_model.encoder.layers.7.layer_norm1.diff": torch.ones(64)}
    with pytest.raises(WrongModelError, match=r"layers\.7\.layer_norm1"):
        attach(quantized(), read_adapter(file_of(deep), spec), "text", 1.0, encoders)
    wide = {"text_encoder_2.encoder.final_layer_norm.diff": torch.ones(65)}
    with pytest.raises(WrongModelError, match="another size"):
        attach(quantized(), read_adapter(file_of(wide), spec), "text", 1.0, encoders)


def test_all_of_a_full_size_text_encoder_file():
    """Norms of 12 CLIP layers and 24 T5 blocks, as an extract has them."""
    keys = []
    for i in range(12):
        for norm in ("layer_norm1", "layer_norm2"):
            stem = f"text_encoders.clip_l.transformer.text_model.encoder.layers.{i}.{norm}"
            keys += [f"{stem}.diff", f"{stem}.diff_b"]
    for i in range(24):
        keys += [f"text_encoders.t5xxl.transformer.encoder.block.{i}.layer.{part}.layer_norm.diff" for part in (0, 1)]
    for modules, prefix in ((wild.clip(), "clip_l"), (wild.t5(), "t5xxl")):
        keys += [f"text_encoders.{prefix}.transformer.{name}.diff" for name in modules]
    found = recognise(keys, FULL)
    assert found.left_over == ()
    assert {component: len(changed) for component, changed in found.changed_norms.items()} == {
        "text_encoder": 48,
        "text_encoder_2": 48,
    }
    assert {component: len(linears) for component, linears in found.text.items()} == {
        "text_encoder": 72,
        "text_encoder_2": 168,
    }
