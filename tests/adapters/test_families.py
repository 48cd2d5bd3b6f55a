"""LoKr, LoHa, DoRA, differences: every key of a full-size file is used, and the effect is that of a dense formula."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace

import families
import pytest
import torch
import wild
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import save_file

from gossamer.adapters import attach, detach, read_adapter, set_scale, write_adapter
from gossamer.adapters.read import build_adapter
from gossamer.adapters.spelling import recognise
from gossamer.errors import AdapterError, FileDamagedError, WrongModelError
from gossamer.formats import packing_names
from gossamer.models.flux_spec import FluxSpec
from gossamer.models.swap import linear_layers

FULL = FluxSpec(19, 38, 24, 128, 64, 64, 4096, 768, True)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

# prefix, naming, whether dots become underscores: what section 1 of the list of file formats has for these families
PREFIXES = {
    "lycoris_": (wild.diffusers, True),
    "lora_unet_": (wild.bfl, True),
    "lora_transformer_": (wild.diffusers, True),
    "transformer.": (wild.diffusers, False),
    "diffusion_model.": (wild.bfl, False),
    "base_model.model.": (wild.diffusers, False),
    "": (wild.bfl, False),
}
every_family = pytest.mark.parametrize("name", families.FAMILIES)
every_prefix = pytest.mark.parametrize("prefix", PREFIXES)


def modules_of(prefix, size):
    """(own name, shape) by the name in the file."""
    naming, underscores = PREFIXES[prefix]
    return {
        prefix + (own.replace(".", "_") if underscores else own): (own, shape) for own, shape in naming(size).items()
    }


def file_of(family, prefix, size=wild.TINY, seed=3, wanted=lambda name: True):
    """Random tensors for every wanted module, by key and by module."""
    generator = torch.Generator().manual_seed(seed)
    by_module = {
        name: family.file(shape, generator) for name, (own, shape) in modules_of(prefix, size).items() if wanted(own)
    }
    return {name + ending: value for name, own in by_module.items() for ending, value in own.items()}, by_module


def tensors_of(part):
    """Every tensor of a term, in order."""
    values = [getattr(part, known.name) for known in fields(part)]
    nested = (tensors_of(value) if is_dataclass(value) else [value] for value in values)
    return [value for of_one in nested for value in of_one if isinstance(value, torch.Tensor)]


def fused_base(own, shape, weights):
    """The base weight of a file's module, put together from the linears that hold its rows."""
    base = torch.empty(shape)
    for linear, rows in wild.placed(own, torch.arange(shape[0])[:, None]).items():
        base[rows[:, 0]] = weights[linear]
    return base


def dense_weights(family, prefix, by_module, weights):
    """The weights (float32) with the adapter's change in float64 added, by linear."""
    changed = {}
    for name, tensors in by_module.items():
        own, shape = modules_of(prefix, wild.TINY)[name]
        base = fused_base(own, shape, weights)
        for linear, delta in wild.placed(own, family.delta(tensors, base)).items():
            changed[linear] = (weights[linear].double() + delta).float()
    return changed


# a full-size file -----------------------------------------------------------------------------------------------------


def full_size(family, prefix):
    """Tensors without data, but for alphas, so that even 24 GB of differences cost nothing."""
    alphas, made, tensors = family.file((16, 16), torch.Generator()), {}, {}
    for module, (_, shape) in modules_of(prefix, wild.FULL).items():
        if shape not in made:
            with torch.device("meta"):
                made[shape] = family.file(shape, None)
        for ending, value in made[shape].items():
            tensors[module + ending] = alphas[ending] if ending == ".alpha" else value
    return tensors


@every_prefix
def test_every_key_of_a_full_size_file_is_used(prefix):
    distinct = {tuple(family.file((16, 16), torch.Generator())): family for family in families.FAMILIES.values()}
    assert len(distinct) == 16
    for family in distinct.values():
        found = recognise(list(full_size(family, prefix)), FULL)
        assert found.left_over == ()
        assert not found.without_effect
        assert {part.name for parts in found.modules for part in parts} == wild.diffusers(wild.FULL).keys()


@every_family
@pytest.mark.parametrize("prefix", ["lora_unet_", "transformer."])
def test_a_full_size_file_becomes_an_adapter(name, prefix):
    tensors = full_size(families.FAMILIES[name], prefix)
    adapter = build_adapter(recognise(list(tensors), FULL), tensors, FULL, {})
    assert {linear: term.shape for linear, term in adapter.terms.items()} == wild.diffusers(wild.FULL)


# the effect -----------------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("prefix", ["lora_unet_", "transformer."])
def test_the_effect_is_the_dense_one(name, prefix, make_model, quantized, paint, spec, tmp_path):
    """Fused modules and their parts; the whole model's output as well as every weight."""
    family, path = families.FAMILIES[name], tmp_path / "family.safetensors"
    tensors, by_module = file_of(family, prefix)
    save_file(tensors, path)
    adapter = read_adapter(path, spec)
    reference, model = make_model(), quantized()
    before = paint(model)
    weights = {linear: reference.get_submodule(linear).weight for linear in linear_layers(model)}
    expected = dense_weights(family, prefix, by_module, weights)
    assert expected.keys() == linear_layers(model).keys()
    attach(model, adapter, "style")
    for linear, layer in linear_layers(model).items():
        torch.testing.assert_close(layer.effective_weight(), expected[linear], **CLOSE)
        reference.get_submodule(linear).weight.copy_(expected[linear])
    torch.testing.assert_close(paint(model), paint(reference), rtol=1e-4, atol=1e-4)
    detach(model, "style")
    assert torch.equal(paint(model), before)


@pytest.mark.parametrize("storage", packing_names())
def test_the_effect_on_every_storage(storage, quantized, spec, tmp_path):
    """On what the storage kept of the weights, the change is the same: nothing of it is quantised."""
    path = tmp_path / "family.safetensors"
    model = quantized({"transformer_blocks.0.attn.*": storage})
    layers = {name: of for name, of in linear_layers(model).items() if name.startswith("transformer_blocks.0.attn.")}
    weights = {name: layer.base_weight(torch.float32).clone() for name, layer in layers.items()}
    for family in families.FAMILIES.values():
        tensors, by_module = file_of(family, "lora_unet_", wanted=lambda own: "_attn.qkv" in own)
        save_file(tensors, path)
        attach(model, read_adapter(path, spec), "style")
        for linear, expected in dense_weights(family, "lora_unet_", by_module, weights).items():
            torch.testing.assert_close(layers[linear].merged_weight(), expected, **CLOSE)
        detach(model, "style")
    for linear, layer in layers.items():
        assert torch.equal(layer.base_weight(torch.float32), weights[linear])


@every_family
def test_strength_interpolates(name, make_model, quantized, spec, tmp_path):
    """Also of DoRA, whose whole effect is scaled, and not what is inside of its norm: 0 is off."""
    family, path = families.FAMILIES[name], tmp_path / "family.safetensors"
    tensors, by_module = file_of(family, "transformer.", wanted=lambda own: own.endswith("to_q"))
    save_file(tensors, path)
    model = quantized()
    layer = linear_layers(model)["transformer_blocks.0.attn.to_q"]
    base = layer.base_weight(torch.float32)
    delta = family.delta(by_module["transformer.transformer_blocks.0.attn.to_q"], base).float()
    attach(model, read_adapter(path, spec), "style", 0.4)
    torch.testing.assert_close(layer.merged_weight(), base + 0.4 * delta, **CLOSE)
    set_scale(model, "style", -0.5)
    torch.testing.assert_close(layer.merged_weight(), base - 0.5 * delta, **CLOSE)
    set_scale(model, "style", 0.0)
    assert torch.equal(layer.merged_weight(), base)


# PEFT as the reference ------------------------------------------------------------------------------------------------

CONFIGS = {
    "DoRA": lambda names: LoraConfig(r=4, lora_alpha=2, target_modules=names, use_dora=True),
    "DoRA, rank-stabilised": lambda names: LoraConfig(
        r=4, lora_alpha=2, target_modules=names, use_dora=True, use_rslora=True
    ),
    "LoRA, rank-stabilised": lambda names: LoraConfig(
        r=9, lora_alpha=2, target_modules=names, use_rslora=True, alpha_pattern={"attn.to_q": 4}
    ),
    "LoRA with biases": lambda names: LoraConfig(r=4, lora_alpha=2, target_modules=names, lora_bias=True),
    "LoKr": lambda names: LoKrConfig(r=4, alpha=2, target_modules=names, decompose_factor=8),
    "LoKr, whole": lambda names: LoKrConfig(r=64, alpha=16, target_modules=names, alpha_pattern={"attn.to_q": 4}),
    "LoKr, both factored": lambda names: LoKrConfig(r=2, alpha=2, target_modules=names, decompose_both=True),
    "LoHa": lambda names: LoHaConfig(r=4, alpha=2, target_modules=names, alpha_pattern={"attn.to_q": 3}),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_folder_that_peft_saved(kind, make_model, quantized, paint, spec, tmp_path):
    names = [name for name in wild.diffusers(wild.TINY) if "blocks" in name]
    wrapped = get_peft_model(make_model(), CONFIGS[kind](names))
    generator = torch.Generator().manual_seed(6)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data = parameter.data * (1 + noise) if "magnitude" in name else noise
    wrapped.eval().save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path / "adapter_model.safetensors", spec)
    assert adapter.terms.keys() == set(names)
    model = quantized()
    plain = paint(model)
    attach(model, adapter, "peft")
    torch.testing.assert_close(paint(model), paint(wrapped), rtol=1e-4, atol=1e-4)
    assert (paint(model) - plain).abs().max() > 0.001


# fused modules, other widths ------------------------------------------------------------------------------------------


def test_parts_of_a_fused_lokr_share_its_factors(spec, tmp_path):
    """768 rows are 4 x 192, so the parts of 256 rows begin inside a block; nothing is multiplied out for that."""
    path = tmp_path / "family.safetensors"
    tensors, _ = file_of(families.LoKr(right_factored=False), "lora_unet_", wanted=lambda own: own.endswith("qkv"))
    save_file(tensors, path)
    adapter = read_adapter(path, spec)
    parts = [adapter.terms[f"transformer_blocks.0.attn.to_{part}"] for part in "qkv"]
    assert [part.kept for part in parts] == [((0, 256),), ((256, 512),), ((512, 768),)]
    assert len({part.right.up.data_ptr() for part in parts}) == 1


def of_input_layer(family, channels, path, spec):
    """An adapter of the input layer alone, made for a model of that many channels."""
    generator = torch.Generator().manual_seed(4)
    made = family.file((256, channels), generator)
    save_file({f"transformer.x_embedder{ending}": value for ending, value in made.items()}, path)
    return made, read_adapter(path, spec)


@every_family
@pytest.mark.parametrize("channels", [128, 384], ids=["Control", "Fill"])
def test_made_for_dev_and_used_on_a_model_that_reads_more(name, channels, quantized, spec, tmp_path):
    """Zero columns are added, but for DoRA, whose norms would run over other weights: that is an error."""
    family, wide = families.FAMILIES[name], replace(spec, in_channels=channels)
    path = tmp_path / "dev.safetensors"
    if isinstance(family, families.DoRA):
        with pytest.raises(WrongModelError, match=f"64 input channels, and this model reads {channels}") as caught:
            of_input_layer(family, 64, path, wide)
        assert path.name in caught.value.what
        return
    made, adapter = of_input_layer(family, 64, path, wide)
    model = quantized(in_channels=channels, out_channels=64)
    layer = linear_layers(model)["x_embedder"]
    base = layer.base_weight(torch.float32)
    expected = base.clone()
    expected[:, :64] += family.delta(made, base[:, :64]).float()
    attach(model, adapter, "style")
    torch.testing.assert_close(layer.merged_weight(), expected, **CLOSE)


@every_family
def test_beside_a_control_lora(name, quantized, make_adapter, spec, tmp_path):
    """The input layer is widened with zeros, so DoRA's norms are what they were."""
    family = families.FAMILIES[name]
    made, adapter = of_input_layer(family, 64, tmp_path / "style.safetensors", spec)
    control = make_adapter(lambda name: name == "x_embedder", channels=128)
    model = quantized()
    layer = linear_layers(model)["x_embedder"]
    base = layer.base_weight(torch.float32)
    term = control.terms["x_embedder"]
    for order in (("style", "control"), ("control", "style")):
        for which in order:
            attach(model, adapter if which == "style" else control, which)
        expected = (term.up @ term.down).clone()
        expected[:, :64] += base + family.delta(made, base).float()
        torch.testing.assert_close(layer.merged_weight(), expected, **CLOSE)
        detach(model, "control")
        detach(model, "style")


# written again --------------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize(("prefix", "spelling"), [("lora_unet_", "diffusers"), ("transformer.", "diffusers")])
def test_written_as_diffusers_and_read_again(name, prefix, spelling, quantized, spec, tmp_path):
    """Parts of a fused LoKr become differences; a DoRA of the columns of a fused module cannot be said."""
    family, path = families.FAMILIES[name], tmp_path / "family.safetensors"
    save_file(file_of(family, prefix)[0], path)
    adapter = read_adapter(path, spec)
    again = tmp_path / "again.safetensors"
    if prefix == "lora_unet_" and isinstance(family, families.DoRA) and family.axis == "columns":
        with pytest.raises(AdapterError, match="columns of a fused module"):
            write_adapter(adapter, again, spelling)
        return
    write_adapter(adapter, again, spelling)
    weights = []
    for file in (path, again):
        model = quantized()
        attach(model, read_adapter(file, spec), "style")
        weights.append({linear: layer.merged_weight() for linear, layer in linear_layers(model).items()})
    for linear, weight in weights[0].items():
        torch.testing.assert_close(weights[1][linear], weight, **CLOSE)


@every_family
def test_written_as_kohya(name, spec, tmp_path):
    """Modules that are not fused keep their family, with their rows in the other order; fused ones cannot be joined."""
    family, path = families.FAMILIES[name], tmp_path / "family.safetensors"
    wanted = ("txt_in", "final_layer.adaLN_modulation.1")
    tensors, _ = file_of(family, "lora_unet_", wanted=lambda own: own in wanted)
    save_file(tensors, path)
    adapter = read_adapter(path, spec)
    write_adapter(adapter, path, "kohya")
    again = read_adapter(path, spec)
    for linear, term in adapter.terms.items():
        assert type(again.terms[linear]) is type(term)
        for one, other in zip(tensors_of(again.terms[linear]), tensors_of(term), strict=True):
            torch.testing.assert_close(one, other)
        assert again.terms[linear].multiplier == pytest.approx(term.multiplier)
    fused, _ = file_of(family, "transformer.", wanted=lambda own: own.endswith("to_q"))
    save_file(fused, path)
    with pytest.raises(AdapterError, match=r"fused module, 'transformer_blocks\.0\.attn\.to_q'"):
        write_adapter(read_adapter(path, spec), path, "kohya")


# errors ---------------------------------------------------------------------------------------------------------------

STEM = "transformer.proj_out"
LOKR = {
    f"{STEM}.lokr_w1": torch.ones(4, 4),
    f"{STEM}.lokr_w2_a": torch.ones(16, 2),
    f"{STEM}.lokr_w2_b": torch.ones(2, 64),
}
LOHA = {
    f"{STEM}.hada_w{side}_{end}": torch.ones(shape) for side in "12" for end, shape in (("a", (64, 2)), ("b", (2, 256)))
}


@pytest.mark.parametrize(
    ("tensors", "changes", "error", "match"),
    [
        (LOKR, {"lokr_w2_b": None}, AdapterError, "no lokr_w2_b"),
        (LOKR, {"lokr_w1": None}, AdapterError, "no lokr_w1_a or lokr_w1_b"),
        (LOKR, {"lokr_w1": torch.ones(4)}, AdapterError, "do not fit together"),
        (LOKR, {"lokr_w1": torch.ones(2, 4)}, WrongModelError, "another size"),
        (LOKR, {"lokr_w2_a": torch.ones(16, 0), "lokr_w2_b": torch.ones(0, 64)}, AdapterError, "no rank"),
        (LOKR, {"lokr_t2": torch.ones(2, 2, 3, 3)}, AdapterError, "convolution"),
        (LOKR, {"dora_scale": torch.ones(3, 1)}, AdapterError, "do not fit together"),
        (LOKR, {"hada_w1_a": torch.ones(64, 2)}, AdapterError, "LoKr and LoHa"),
        (LOKR, {"diff": torch.ones(64, 256)}, AdapterError, "LoKr and difference"),
        (LOHA, {"hada_w2_a": None}, AdapterError, "no hada_w2_a"),
        (LOHA, {"hada_w2_a": torch.ones(63, 2)}, AdapterError, "do not fit together"),
        (LOHA, {"alpha": torch.ones(2)}, AdapterError, "2 values"),
        (LOHA, {"diff_b": torch.ones(63)}, AdapterError, "do not fit together"),
        ({f"{STEM}.diff": torch.ones(64, 255)}, {}, WrongModelError, "another size"),
        ({f"{STEM}.diff": torch.ones(64)}, {}, AdapterError, "do not fit together"),
        ({f"{STEM}.diff_b": torch.ones(63)}, {}, WrongModelError, "another size"),
        ({f"{STEM}.dora_scale": torch.ones(64, 1)}, {}, AdapterError, "magnitude for 'transformer.proj_out', but no"),
        ({f"{STEM}.diff": torch.full((64, 256), torch.inf)}, {}, FileDamagedError, "not finite"),
    ],
)
def test_tensors_that_make_no_sense(tensors, changes, error, match, spec, tmp_path):
    path = tmp_path / "odd.safetensors"
    tensors = tensors | {f"{STEM}.{ending}": value for ending, value in changes.items()}
    save_file({key: value for key, value in tensors.items() if value is not None}, path)
    with pytest.raises(error, match=match) as caught:
        read_adapter(path, spec)
    assert type(caught.value) is error
    assert "proj_out" in str(caught.value)
    assert path.name in caught.value.what
    assert caught.value.why
    assert caught.value.next_step


def test_a_fused_lokr_of_another_height(spec, tmp_path):
    path = tmp_path / "odd.safetensors"
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file({f"{stem}.lokr_w1": torch.ones(4, 4), f"{stem}.lokr_w2": torch.ones(64, 64)}, path)
    with pytest.raises(WrongModelError, match=r"\(256, 256\); the model's layer is \(768, 256\)"):
        read_adapter(path, spec)
