"""Every low-rank spelling of shared/file-formats.md: all keys of a full-size file are used and do what they say."""

from __future__ import annotations

import pytest
import torch
import wild
from diffusers.loaders.lora_conversion_utils import (
    _convert_kohya_flux_lora_to_diffusers,
    _convert_xlabs_flux_lora_to_diffusers,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from gossamer.adapters import attach, read_adapter
from gossamer.adapters.spelling import recognise
from gossamer.errors import AdapterError
from gossamer.models.flux_spec import FluxSpec
from gossamer.models.swap import linear_layers

FULL = FluxSpec(19, 38, 24, 128, 64, 64, 4096, 768, True)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

every_spelling = pytest.mark.parametrize("name", wild.SPELLINGS)


def own_modules(spelling, size):
    return {full: shape for full, (_, shape) in spelling.transformer(size).items()}


def changed_linears(spelling, size):
    """The diffusers linears in the modules of a spelling."""
    named = (wild.placed(own, torch.empty(shape, device="meta")) for own, shape in spelling.transformer(size).values())
    return {linear: tuple(change.shape) for changes in named for linear, change in changes.items()}


def test_the_namings_cover_the_model():
    """The typed namings agree with each other: 504 linears, each of its size."""
    expected = wild.diffusers(wild.FULL)
    assert len(expected) == 504
    assert changed_linears(wild.SPELLINGS["kohya, embedders and final layer"], wild.FULL) == expected
    assert changed_linears(wild.SPELLINGS["OneTrainer, BFL names"], wild.FULL) == expected


@every_spelling
def test_every_key_of_a_full_size_file_is_used(name):
    spelling = wild.SPELLINGS[name]
    modules, texts = own_modules(spelling, wild.FULL), spelling.text()
    found = recognise(spelling.keys([*modules, *texts]), FULL)
    assert found.left_over == ()
    assert not found.without_effect
    assert not found.norms
    assert {part.name for parts in found.modules for part in parts} == changed_linears(spelling, wild.FULL).keys()
    assert len(found.modules) == len(modules)
    assert {component: len(linears) for component, linears in found.text.items()} == (
        {"text_encoder": 72, "text_encoder_2": 168} if texts else {}
    )


@every_spelling
def test_a_full_size_file_is_read(name, tmp_path):
    spelling = wild.SPELLINGS[name]
    path = tmp_path / "full.safetensors"
    save_file(spelling.file({**own_modules(spelling, wild.FULL), **spelling.text()}, dtype=torch.float8_e4m3fn), path)
    adapter = read_adapter(path, FULL)
    path.unlink()
    assert {linear: term.shape for linear, term in adapter.terms.items()} == changed_linears(spelling, wild.FULL)
    if spelling.texts:
        assert {linear: term.shape for linear, term in adapter.text["text_encoder"].items()} == wild.clip()
        assert {linear: term.shape for linear, term in adapter.text["text_encoder_2"].items()} == wild.t5()


def dense_reference(make_model, spelling, tensors):
    """The model with every term multiplied out and added in plain torch."""
    reference, done = make_model(), 0
    for full, (own, _) in spelling.transformer(wild.TINY).items():
        down, up = tensors[full + spelling.down], tensors[full + spelling.up]
        alpha = tensors[full + ".alpha"] if spelling.alpha else down.shape[0]
        change = (alpha / down.shape[0]) * (up.double() @ down.double())
        for linear, rows in wild.placed(own, change).items():
            weight = reference.get_submodule(linear).weight
            assert weight.shape == rows.shape
            weight.copy_((weight.double() + rows).float())
            done += 1
    return reference, done


@every_spelling
def test_the_effect_is_the_dense_change(name, make_model, quantized, paint, spec, tmp_path):
    spelling = wild.SPELLINGS[name]
    generator = torch.Generator().manual_seed(3)
    tensors = spelling.file(own_modules(spelling, wild.TINY), rank=3, generator=generator, alpha=2)
    save_file(tensors, tmp_path / "tiny.safetensors")
    adapter = read_adapter(tmp_path / "tiny.safetensors", spec)
    reference, linears = dense_reference(make_model, spelling, tensors)
    assert len(adapter.terms) == linears
    model = quantized()
    before = paint(model)
    attach(model, adapter, "style")
    for linear, layer in linear_layers(model).items():
        torch.testing.assert_close(layer.effective_weight(), reference.get_submodule(linear).weight, **CLOSE)
    torch.testing.assert_close(paint(model), paint(reference), **CLOSE)
    assert (paint(model) - before).abs().max() > 0.01


def test_the_final_modulation_of_bfl_is_shift_then_scale(spec, tmp_path):
    """Only the shift is changed, which is the second half of diffusers' norm_out.linear."""
    up = torch.cat([torch.ones(256, 1), torch.zeros(256, 1)])
    stems = ("lora_unet_final_layer_adaLN_modulation_1", "base_model.model.final_layer.adaLN_modulation.1")
    for stem in stems:
        path = tmp_path / "final.safetensors"
        save_file({f"{stem}.lora_down.weight": torch.ones(1, 256), f"{stem}.lora_up.weight": up}, path)
        term = read_adapter(path, spec).terms["norm_out.linear"]
        assert not term.up[:256].any()
        assert term.up[256:].all()


# diffusers as the reference, for the spellings that it loads


def products(state, prefix="transformer."):
    stems = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
    return {
        stem.removeprefix(prefix): state[f"{stem}.lora_B.weight"] @ state[f"{stem}.lora_A.weight"] for stem in stems
    }


def assert_same_products(adapter, theirs):
    assert adapter.terms.keys() == theirs.keys()
    for linear, term in adapter.terms.items():
        torch.testing.assert_close(term.multiplier * term.up @ term.down, theirs[linear], **CLOSE)


@pytest.mark.parametrize("name", ["XLabs", "USO"])
def test_xlabs_as_diffusers_converts_it(name, spec, tmp_path):
    spelling = wild.SPELLINGS[name]
    tensors = spelling.file(own_modules(spelling, wild.TINY), rank=3, generator=torch.Generator().manual_seed(1))
    save_file(tensors, tmp_path / "xlabs.safetensors")
    theirs = _convert_xlabs_flux_lora_to_diffusers(dict(tensors))
    assert_same_products(read_adapter(tmp_path / "xlabs.safetensors", spec), products(theirs))


def test_onetrainer_as_diffusers_converts_it(spec, tmp_path):
    """Attention and the ends only: diffusers 0.42.1 gives feed-forward and modulation a name that no layer has."""
    spelling = wild.SPELLINGS["OneTrainer, diffusers names"]
    modules = {module: shape for module, shape in own_modules(spelling, wild.TINY).items() if "_ff" not in module}
    modules = {module: shape for module, shape in modules.items() if "blocks" not in module or "_attn_" in module}
    tensors = spelling.file(modules, rank=4, generator=torch.Generator().manual_seed(1), alpha=2)
    save_file(tensors, tmp_path / "onetrainer.safetensors")
    theirs = _convert_kohya_flux_lora_to_diffusers(dict(tensors))
    assert_same_products(read_adapter(tmp_path / "onetrainer.safetensors", spec), products(theirs))


@pytest.mark.parametrize("name", ["diffusers", "diffusers, before PEFT"])
def test_diffusers_loads_the_same_file(name, make_model, quantized, paint, pipeline, spec, tmp_path):
    spelling = wild.SPELLINGS[name]
    generator = torch.Generator().manual_seed(5)
    tensors = spelling.file(own_modules(spelling, wild.TINY), rank=4, generator=generator)
    path = tmp_path / "same.safetensors"
    save_file(tensors, path)
    theirs = pipeline(make_model())
    theirs.load_lora_weights(str(tmp_path), weight_name=path.name)
    ours = quantized()
    attach(ours, read_adapter(path, spec), "same")
    torch.testing.assert_close(paint(ours), paint(theirs.transformer), **CLOSE)


# odd keys


def test_a_trailing_underscore(spec):
    keys = [f"lora_unet_context_embedder{end}" for end in (".lora_down.weight", ".lora_up.weight", "_.alpha")]
    found = recognise(keys, spec)
    assert not found.unused
    ((parts, roles),) = found.modules.items()
    assert (parts[0].name, roles["alpha"]) == ("context_embedder", "lora_unet_context_embedder_.alpha")


PAIR = {
    "transformer.proj_out.lora_A.weight": torch.ones(2, 256),
    "transformer.proj_out.lora_B.weight": torch.ones(64, 2),
}


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("bundle_emb.my_style.clip_l", "embedding"),
        ("bundle_emb.my_style.t5_out", "embedding"),
        ("lora_te1_text_projection.lora_down.weight", "text projection"),
        ("text_encoders.clip_l.transformer.text_projection.lora_up.weight", "text projection"),
        ("lora_unet_context_embedder_.alpha", "no factors"),
    ],
)
def test_keys_without_effect_are_named_with_the_reason(key, reason, spec, tmp_path):
    path = tmp_path / "odd.safetensors"
    save_file({**PAIR, key: torch.ones(1, dtype=torch.int32)}, path)
    adapter = read_adapter(path, spec)
    assert adapter.terms.keys() == {"proj_out"}
    assert adapter.unused.keys() == {key}
    assert reason in adapter.unused[key]
    save_file({key: torch.ones(1)}, path)
    with pytest.raises(AdapterError, match="None of the 1 keys") as caught:
        read_adapter(path, spec)
    assert key in caught.value.why


@pytest.mark.parametrize(
    "extra",
    [
        ["diffusion_model.final_layer.linear.lora_A.weight"],
        ["transformer.norm_out.linear.lora_A.weight", "final_layer.adaLN_modulation.1.lora_A.weight"],
        ["double_blocks.0.img_attn.qkv.lora_A.weight", "double_blocks.0.processor.qkv_lora1.down.weight"],
        ["double_blocks.0.img_attn.qkv.lora_A.weight", "double_blocks.0.img_attn.qkv.1.lora_A.weight"],
    ],
)
def test_two_names_for_one_linear_are_refused(extra, spec, tmp_path):
    path = tmp_path / "twice.safetensors"
    save_file({**PAIR, **{key: torch.ones(2, 256) for key in extra}}, path)
    with pytest.raises(AdapterError, match="have no place") as caught:
        read_adapter(path, spec)
    assert any(key in caught.value.what for key in extra)


def test_no_two_modules_have_one_underscored_name():
    for naming in (wild.diffusers, wild.bfl):
        assert len(wild.underscored(naming(wild.FULL))) == len(naming(wild.FULL))


def with_random_b(model):
    """PEFT starts with up factors of zero."""
    generator = torch.Generator().manual_seed(6)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def test_a_file_that_peft_saved(make_model, quantized, paint, spec, tmp_path):
    wrapped = with_random_b(get_peft_model(make_model(), LoraConfig(r=4, lora_alpha=4, target_modules="all-linear")))
    wrapped.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path / "adapter_model.safetensors", spec)
    model = quantized()
    attach(model, adapter, "peft")
    torch.testing.assert_close(paint(model), paint(wrapped), **CLOSE)
