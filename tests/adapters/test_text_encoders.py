"""Adapters' terms for CLIP and T5: read in every spelling, attached to swapped encoders, gone without a trace."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import wild
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from gossamer.adapters import Adapter, LowRankTerm, attach, attached, detach, read_adapter, set_scale, write_adapter
from gossamer.adapters.peft_settings import KEY
from gossamer.errors import AdapterError, WrongModelError
from gossamer.models.swap import linear_layers, quantize

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
CLIP, T5 = wild.clip(layers=2, width=64), wild.t5(layers=2, width=64, inner=32, mlp=96)
TOKENS = torch.tensor([[3, 5, 7, 1]])
PREFIXES = {
    "kohya": ("lora_te1_", "lora_te3_"),
    "kohya, older": ("lora_te_", "lora_te3_"),
    "OneTrainer": ("lora_te1_", "lora_te2_"),
    "OneTrainer, dots": ("clip_l.", "t5."),
    "diffusers": ("text_encoder.", "text_encoder_2."),
    "PEFT": ("text_encoder.base_model.model.", "base_model.model.text_encoder_2."),
    "ComfyUI": ("text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer."),
}


def new_encoders():
    torch.manual_seed(4)
    clip = CLIPTextConfig(
        vocab_size=20, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2
    )
    t5 = T5Config(
        vocab_size=20, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    models = {"text_encoder": CLIPTextModel(clip), "text_encoder_2": T5EncoderModel(t5)}
    return {name: model.eval().requires_grad_(False) for name, model in models.items()}


@pytest.fixture
def encoders():
    """Both text encoders, tiny, with their linears packed."""
    models = new_encoders()
    for model in models.values():
        quantize(model, "fp32")
    return models


@torch.inference_mode()
def encode(models):
    return [model(TOKENS).last_hidden_state for model in models.values()]


def random_term(shape, generator, rank=3, multiplier=0.5):
    down, up = torch.randn(rank, shape[1], generator=generator), torch.randn(shape[0], rank, generator=generator)
    return LowRankTerm(down * 0.2, up * 0.2, multiplier)


@pytest.fixture
def adapter(spec):
    """A term for every linear of both encoders, and one for the transformer."""
    generator = torch.Generator().manual_seed(8)
    text = {
        component: {name: random_term(shape, generator) for name, shape in shapes.items()}
        for component, shapes in {"text_encoder": CLIP, "text_encoder_2": T5}.items()
    }
    return Adapter(spec, {"proj_out": random_term((64, 256), generator)}, text=text)


def dense(adapter, scale):
    models = new_encoders()
    for component, terms in adapter.text.items():
        modules = dict(models[component].named_modules())
        for name, term in terms.items():
            linear = modules.get(name) or modules[name.removeprefix("text_model.")]
            linear.weight += scale * term.multiplier * (term.up @ term.down)
    return models


def assert_close(found, expected):
    for ours, theirs in zip(encode(found), encode(expected), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def state(models):
    return [tensor.clone() for model in models.values() for tensor in model.state_dict().values()]


def test_attach_scale_detach(adapter, encoders, quantized):
    model, before = quantized(), state(encoders)
    plain = encode(encoders)
    attach(model, adapter, "style", 0.8, encoders)
    assert_close(encoders, dense(adapter, 0.8))
    assert all((now - then).abs().max() > 0.01 for now, then in zip(encode(encoders), plain, strict=True))
    set_scale(model, "style", 0.3, encoders)
    assert_close(encoders, dense(adapter, 0.3))
    assert detach(model, "style", encoders) is adapter
    assert all(torch.equal(*pair) for pair in zip(encode(encoders), plain, strict=True))
    assert all(torch.equal(*pair) for pair in zip(state(encoders), before, strict=True))
    assert not any(layer.names() for part in (model, *encoders.values()) for layer in linear_layers(part).values())


@pytest.mark.parametrize("name", PREFIXES)
def test_every_spelling_does_the_same(name, adapter, encoders, quantized, spec, tmp_path):
    path = tmp_path / "text.safetensors"
    tensors = {}
    for prefix, terms in zip(PREFIXES[name], adapter.text.values(), strict=True):
        for module, term in terms.items():
            stem = prefix + (module.replace(".", "_") if prefix.endswith("_") else module)
            tensors |= {f"{stem}.lora_down.weight": term.down, f"{stem}.lora_up.weight": term.up}
            tensors[f"{stem}.alpha"] = torch.tensor(term.multiplier * term.rank)
    save_file(tensors, path)
    found = read_adapter(path, spec)
    assert not found.terms
    assert not found.unused
    attach(quantized(), found, "text", 1.0, encoders)
    assert_close(encoders, dense(adapter, 1.0))


def test_names_of_transformers_5_are_read_too(spec, tmp_path):
    path = tmp_path / "text.safetensors"
    stem = "text_encoder.encoder.layers.0.mlp.fc1"
    save_file({f"{stem}.lora_A.weight": torch.ones(1, 64), f"{stem}.lora_B.weight": torch.ones(256, 1)}, path)
    assert read_adapter(path, spec).text["text_encoder"].keys() == {"text_model.encoder.layers.0.mlp.fc1"}


@pytest.mark.parametrize("spelling", ["diffusers", "kohya"])
def test_round_trip(spelling, adapter, spec, tmp_path):
    path = tmp_path / "text.safetensors"
    write_adapter(adapter, path, spelling)
    key = {"diffusers": "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight"}.get(
        spelling, "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight"
    )
    assert key in load_file(path)
    found = read_adapter(path, spec)
    assert found.text.keys() == adapter.text.keys()
    for component, terms in adapter.text.items():
        assert found.text[component].keys() == terms.keys()
        for name, term in terms.items():
            other = found.text[component][name]
            assert torch.equal(other.down, term.down)
            assert torch.equal(other.up, term.up)
            assert other.multiplier == term.multiplier


def test_bfl_cannot_say_it(adapter, tmp_path):
    with pytest.raises(AdapterError, match="terms of the text_encoder"):
        write_adapter(adapter, tmp_path / "text.safetensors", "bfl")


def test_alpha_of_each_component_in_pefts_settings(spec, tmp_path):
    path, tensors = tmp_path / "text.safetensors", {}
    stems = (
        "text_encoder.text_model.encoder.layers.0.mlp.fc2",
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.o",
    )
    for stem in stems:
        tensors |= {f"{stem}.lora_A.weight": torch.ones(2, 32), f"{stem}.lora_B.weight": torch.ones(64, 2)}
    settings = {"transformer.lora_alpha": 64, "text_encoder.lora_alpha": 8, "text_encoder_2.lora_alpha": 1}
    save_file(tensors, path, {KEY: json.dumps(settings)})
    text = read_adapter(path, spec).text
    assert [term.multiplier for terms in text.values() for term in terms.values()] == [4.0, 0.5]


# nothing is dropped, and an error leaves everything as it was


def refused(model, encoders, call, error, match):
    names = [layer.names() for part in (model, *encoders.values()) for layer in linear_layers(part).values()]
    with pytest.raises(error, match=match) as caught:
        call()
    assert caught.value.why
    assert caught.value.next_step
    assert names == [layer.names() for part in (model, *encoders.values()) for layer in linear_layers(part).values()]


def test_without_the_encoders(adapter, encoders, quantized):
    model = quantized()
    refused(model, encoders, lambda: attach(model, adapter, "style"), AdapterError, "text_encoder and text_encoder_2")
    one = {"text_encoder": encoders["text_encoder"]}
    refused(model, encoders, lambda: attach(model, adapter, "style", 1.0, one), AdapterError, "changes text_encoder_2")
    attach(model, adapter, "style", 1.0, encoders)
    refused(model, encoders, lambda: detach(model, "style"), AdapterError, "only the transformer was given")
    refused(model, encoders, lambda: set_scale(model, "style", 0.5), AdapterError, "only the transformer was given")
    assert attached(model)["style"].scale == 1.0


def test_the_transformers_part_alone(adapter, quantized):
    model = quantized()
    attach(model, adapter.without_text(), "style")
    assert linear_layers(model)["proj_out"].names() == ("style",)
    detach(model, "style")


def test_encoders_that_do_not_fit(adapter, encoders, quantized, spec):
    model = quantized()
    swapped = {"text_encoder": encoders["text_encoder_2"], "text_encoder_2": encoders["text_encoder"]}
    refused(model, encoders, lambda: attach(model, adapter, "a", 1.0, swapped), WrongModelError, "does not have")
    plain = new_encoders()
    refused(model, encoders, lambda: attach(model, adapter, "a", 1.0, plain), AdapterError, "cannot take an adapter")
    wide = {"text_model.encoder.layers.0.mlp.fc1": LowRankTerm(torch.ones(1, 128), torch.ones(512, 1))}
    other = Adapter(spec, {}, text={"text_encoder": wide})
    refused(model, encoders, lambda: attach(model, other, "a", 1.0, encoders), WrongModelError, "another size")
    deep = {"text_model.encoder.layers.7.mlp.fc1": LowRankTerm(torch.ones(1, 64), torch.ones(256, 1))}
    other = Adapter(spec, {}, text={"text_encoder": deep})
    refused(model, encoders, lambda: attach(model, other, "a", 1.0, encoders), WrongModelError, "layers.7")


def test_a_name_that_an_encoder_has(adapter, encoders, quantized):
    attach(quantized(), adapter, "style", 1.0, encoders)
    other = quantized()
    refused(other, encoders, lambda: attach(other, adapter, "style", 1.0, encoders), AdapterError, "already attached")


def test_terms_that_were_removed_behind_our_back(adapter, encoders, quantized):
    model = quantized()
    attach(model, adapter, "style", 1.0, encoders)
    next(iter(linear_layers(encoders["text_encoder"]).values())).remove("style")
    refused(model, encoders, lambda: detach(model, "style", encoders), AdapterError, "text encoders")


def test_terms_of_different_encoders(spec):
    terms = {
        "text_model.encoder.layers.0.self_attn.q_proj": LowRankTerm(torch.ones(1, 64), torch.ones(64, 1)),
        "text_model.encoder.layers.1.mlp.fc1": LowRankTerm(torch.ones(1, 96), torch.ones(384, 1)),
    }
    with pytest.raises(AdapterError, match="do not fit one encoder"):
        Adapter(spec, {}, text={"text_encoder": terms})
    with pytest.raises(WrongModelError, match="text_encoder_3"):
        Adapter(spec, {}, text={"text_encoder_3": {}})
    with pytest.raises(WrongModelError, match=r"text_encoder\.surprise"):
        Adapter(spec, {}, text={"text_encoder": {"surprise": terms.popitem()[1]}})


def test_a_copied_model_and_its_copied_encoders(adapter, encoders, quantized):
    model = quantized()
    attach(model, adapter, "style", 1.0, encoders)
    twin, twin_encoders = copy.deepcopy((model, encoders))
    detach(model, "style", encoders)
    assert_close(twin_encoders, dense(adapter, 1.0))
    detach(twin, "style", twin_encoders)
    assert_close(twin_encoders, encoders)


def test_files_that_peft_saved(encoders, quantized, spec, tmp_path):
    """PEFT computes the reference, and names the modules as the transformers that is installed does."""
    wrapped, tensors = {}, {}
    for component, model in new_encoders().items():
        torch.manual_seed(2)
        config = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "fc1", "fc2", "q", "o", "wi_1", "wo"])
        wrapped[component] = get_peft_model(model, config, adapter_name="default")
        for name, parameter in wrapped[component].named_parameters():
            if "lora_" in name:
                parameter.data.copy_(torch.randn(parameter.shape) * 0.2)
                tensors[f"{component}.{name}"] = parameter.detach().contiguous()
    save_file(tensors, tmp_path / "peft.safetensors")
    adapter = read_adapter(tmp_path / "peft.safetensors", spec)
    attach(quantized(), adapter, "peft", 1.0, encoders)
    assert_close(encoders, wrapped)
