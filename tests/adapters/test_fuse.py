"""Fusing: what is stored is what packing the changed weight gives, its fidelity is measured, and nothing is lost."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from gossamer.adapters import (
    Adapter,
    DecomposedTerm,
    HadamardTerm,
    KroneckerTerm,
    LowRankTerm,
    Matrix,
    attach,
    attached,
    detach,
    fuse,
    fuse_layers,
    fused_adapters,
    read_adapter,
    unfuse,
    write_adapter,
)
from gossamer.errors import AdapterError, InvalidOptionError
from gossamer.formats import Packed, pack, packing_names, unpack
from gossamer.layers import StoredWeight
from gossamer.layers.stored import Slot
from gossamer.models.flux import from_diffusers, prepare
from gossamer.models.flux_spec import FluxSpec
from gossamer.models.swap import linear_layers, quantize

QUERY = "transformer_blocks.0.attn.to_q"
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
pytestmark = pytest.mark.filterwarnings("ignore:Fused into")


def state_of(model):
    """Every byte of the model, its config, and the identity of its parameters."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return tensors, dict(model.config), {name: id(parameter) for name, parameter in model.named_parameters()}


def assert_same_state(model, before):
    tensors, config, identities = state_of(model)
    assert (config, identities, tensors.keys()) == (before[1], before[2], before[0].keys())
    for name, tensor in tensors.items():
        other = before[0][name]
        assert tensor.dtype == other.dtype
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)), name


def changes(adapter, scale):
    """What each linear gets, by its own arithmetic."""
    return {
        name: scale * term.multiplier * term.up.double() @ term.down.double() for name, term in adapter.terms.items()
    }


@pytest.fixture
def style(make_adapter):
    return make_adapter(lambda name: "attn" in name or name == "proj_out", multiplier=0.5, bias=True)


# what is stored, and what survives ------------------------------------------------------------------------------------


def test_in_float32_it_is_what_diffusers_fuses(make_adapter, make_model, quantized, pipeline, spec, paint, tmp_path):
    path = tmp_path / "style.safetensors"
    write_adapter(make_adapter(multiplier=0.5), path)
    reference = pipeline(make_model())
    reference.load_lora_weights(str(tmp_path), weight_name=path.name)
    reference.fuse_lora(lora_scale=0.7)
    reference.unload_lora_weights()
    model = quantized()
    attach(model, read_adapter(path, spec), "style", 0.7)
    report = fuse(model, ["style"])
    for name, layer in linear_layers(model).items():
        theirs = reference.transformer.get_submodule(name)
        torch.testing.assert_close(layer.stored.unpack(torch.float32), theirs.weight.data, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(paint(model), paint(reference.transformer), **CLOSE)
    assert report.fidelity == report.kept == 1
    assert report.warning is None
    assert report.adapters == {"style": 0.7}
    assert report.layers.keys() == linear_layers(model).keys()


@pytest.mark.parametrize("storage", packing_names())
def test_every_storage_and_back(storage, quantized, make_adapter, paint):
    wanted = (QUERY, "norm_out.linear")
    adapter = make_adapter(lambda name: name in wanted, bias=True)
    model = quantized(dict.fromkeys(wanted, storage))
    before, plain = state_of(model), paint(model)
    bases = {name: layer.stored.unpack(torch.float32) for name, layer in linear_layers(model).items()}
    stored_bytes = sum(linear_layers(model)[name].packed.nbytes for name in wanted)
    attach(model, adapter, "style", 0.8)
    exact = paint(model)
    report = fuse(model, ["style"])
    assert not any(layer.names() for layer in linear_layers(model).values())
    assert report.layers.keys() == set(wanted)
    assert report.original_bytes == stored_bytes
    for name, change in changes(adapter, 0.8).items():
        layer, base = linear_layers(model)[name], bases[name]
        expected = pack((base.double() + change).float(), storage)
        assert layer.packed.format == storage
        found = layer.stored.unpack(torch.float32)
        # a value half way between two codes, or a scale that fits as well, may fall to either side
        assert (found - unpack(expected, torch.float32)).norm() < 0.03 * change.norm()
        became = found.double() - base.double()
        fidelity = 1 - (became - change).norm() / change.norm()
        assert report.layers[name].fidelity == pytest.approx(float(fidelity), abs=2e-3)
        kept = (became * change).sum() / change.square().sum()
        assert report.layers[name].kept == pytest.approx(float(kept), abs=2e-3)
    if storage == "fp32":
        torch.testing.assert_close(paint(model), exact, **CLOSE)
    assert unfuse(model) == ("style",)
    assert attached(model)["style"].scale == 0.8
    torch.testing.assert_close(paint(model), exact, rtol=0, atol=0)
    detach(model, "style")
    assert_same_state(model, before)
    assert torch.equal(paint(model), plain)


def test_the_fidelity_of_a_small_change(quantized, make_adapter):
    """A change far below the steps of four bits vanishes; float32 holds it."""
    adapter = make_adapter(lambda name: name == QUERY)
    fidelities = {}
    for storage in ("fp32", "bf16", "int8", "nf4"):
        model = quantized({QUERY: storage})
        attach(model, adapter, "style", 0.02)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = fuse(model, ["style"])
        fidelities[storage] = report.fidelity
        assert bool(report.warning) == bool(caught) == (report.fidelity < 0.8)
    assert fidelities["fp32"] == 1
    assert fidelities["fp32"] > fidelities["bf16"] > fidelities["int8"]
    assert fidelities["nf4"] < 0.2
    assert str(caught[0].message) == report.warning
    term_bytes = sum(tensor.numel() * 4 for tensor in (adapter.terms[QUERY].down, adapter.terms[QUERY].up))
    assert report.attached_bytes == term_bytes
    for words in ("nf4", "'style'", QUERY, f"{term_bytes / 1e6:.1f} MB", "unfuse()"):
        assert words in report.warning


def test_the_whole_is_one_long_vector(quantized, make_adapter):
    adapter = make_adapter(lambda name: "attn.to_" in name)
    model = quantized("int8")
    bases = {name: layer.stored.unpack(torch.float64) for name, layer in linear_layers(model).items()}
    attach(model, adapter, "style")
    report = fuse(model, ["style"])
    wanted = torch.cat([change.flatten() for change in changes(adapter, 1.0).values()])
    layers = linear_layers(model)
    became = torch.cat([(layers[name].stored.unpack(torch.float64) - bases[name]).flatten() for name in adapter.terms])
    assert report.fidelity == pytest.approx(float(1 - (became - wanted).norm() / wanted.norm()), abs=1e-4)
    assert report.kept == pytest.approx(float(became @ wanted / (wanted @ wanted)), abs=1e-4)
    worst = report.worst(2)
    assert list(worst.values()) == sorted(layer.fidelity for layer in report.layers.values())[:2]


def test_a_weight_that_nothing_changes_keeps_its_bytes(quantized, spec):
    term = LowRankTerm(torch.zeros(2, 256), torch.ones(256, 2), bias=torch.full((256,), 0.25))
    model = quantized({QUERY: "nf4"})
    layer = linear_layers(model)[QUERY]
    stored, bias = layer.stored, layer.bias.clone()
    attach(model, Adapter(spec, {QUERY: term}), "bias")
    report = fuse(model, ["bias"])
    assert report.layers == {}
    assert report.fidelity == 1
    assert layer.stored is stored
    assert torch.equal(layer.bias, bias + 0.25)
    assert report.original_bytes == 0


def test_biases_lose_nothing(make_model, make_adapter):
    model = make_model().bfloat16()
    quantize(model, "bf16")
    adapter = make_adapter(lambda name: name == QUERY, bias=True)
    layer = linear_layers(model)[QUERY]
    expected = layer.bias.float() + 0.3 * adapter.terms[QUERY].bias
    attach(model, adapter, "style", 0.3)
    fuse(model, ["style"])
    assert torch.equal(layer.bias.float(), expected)
    unfuse(model)
    assert layer.bias.dtype == torch.bfloat16


# together with other adapters -----------------------------------------------------------------------------------------


def test_others_stay_attached(quantized, make_adapter, style, paint):
    other = make_adapter(seed=3)
    model, apart = quantized(), quantized()
    for name, adapter in (("style", style), ("other", other)):
        attach(model, adapter, name, 0.6)
        attach(apart, adapter, name, 0.6)
    fuse(model, ["style"])
    assert list(attached(model)) == ["other"]
    assert fused_adapters(model) == {"style": 0.6}
    torch.testing.assert_close(paint(model), paint(apart), **CLOSE)
    detach(model, "other")
    detach(apart, "other")
    torch.testing.assert_close(paint(model), paint(apart), **CLOSE)
    attach(model, other, "other", -0.5)
    unfuse(model)
    assert list(attached(model)) == ["other", "style"]
    attach(apart, other, "other", -0.5)
    torch.testing.assert_close(paint(model), paint(apart), **CLOSE)


def test_several_in_one_call(quantized, make_adapter, style, paint):
    model, apart = quantized(), quantized()
    for each in (model, apart):
        attach(each, style, "style", 0.6)
        attach(each, make_adapter(seed=5), "off", 0.0)
        attach(each, make_adapter(seed=3), "other", -0.4)
    report = fuse(model, ["other", "style", "off", "other"])
    assert report.adapters == {"style": 0.6, "off": 0.0, "other": -0.4}
    torch.testing.assert_close(paint(model), paint(apart), **CLOSE)


def low_rank(out_features, in_features, rank, generator):
    down = torch.randn(rank, in_features, generator=generator) * 0.1
    return LowRankTerm(down, torch.randn(out_features, rank, generator=generator) * 0.1)


@pytest.fixture
def families(spec):
    """LoKr, LoHa and DoRA on three linears; the DoRA's magnitudes are not the base's."""
    generator = torch.Generator().manual_seed(4)

    def random(*shape):
        return torch.randn(*shape, generator=generator) * 0.1

    inner = low_rank(256, 256, 4, generator)
    terms = {
        QUERY: DecomposedTerm(inner, 0.5 + random(256, 1).abs()),
        "transformer_blocks.0.attn.to_k": KroneckerTerm(Matrix(random(4, 4)), Matrix(random(64, 64))),
        "transformer_blocks.0.attn.to_v": HadamardTerm(
            random(256, 12), random(12, 256), random(256, 12), random(12, 256)
        ),
    }
    return Adapter(spec, terms)


def test_kinds_that_are_not_low_rank(quantized, families, style, paint):
    model, apart = quantized("fp32"), quantized("fp32")
    for each in (model, apart):
        attach(each, style, "style", 0.7)
        attach(each, families, "families", 0.9)
    expected = paint(apart)
    report = fuse(model, ["style", "families"])
    assert report.layers.keys() >= families.terms.keys()
    torch.testing.assert_close(paint(model), expected, **CLOSE)
    unfuse(model)
    assert torch.equal(paint(model), expected)


def test_a_dora_that_stays_would_change(quantized, families, style):
    model = quantized()
    attach(model, style, "style")
    attach(model, families, "families")
    before = state_of(model)
    with pytest.raises(AdapterError, match="while 'families' stays attached") as caught:
        fuse(model, ["style"])
    assert QUERY in caught.value.why
    assert "Fuse 'families' too" in caught.value.next_step
    assert_same_state(model, before)
    fuse(model, ["families"])
    assert list(attached(model)) == ["style"]


# Control LoRAs --------------------------------------------------------------------------------------------------------


def test_a_control_lora_leaves_its_width_and_its_norms(quantized, control, style, paint):
    model = quantized()
    before = state_of(model)
    attach(model, style, "style", 0.5)
    attach(model, control, "control", 0.9)
    expected = paint(model, 128)
    report = fuse(model, ["control"])
    assert report.fidelity == 1
    assert model.config.in_channels == 128
    assert linear_layers(model)["x_embedder"].packed.shape[1] == 128
    torch.testing.assert_close(paint(model, 128), expected, **CLOSE)
    detach(model, "style")
    assert model.config.in_channels == 128
    attach(model, style, "style", 0.5)
    torch.testing.assert_close(paint(model, 128), expected, **CLOSE)
    unfuse(model)
    torch.testing.assert_close(paint(model, 128), expected, **CLOSE)
    detach(model, "control")
    detach(model, "style")
    assert_same_state(model, before)


def test_a_style_that_is_fused_beside_a_control_lora(quantized, control, make_adapter, paint):
    style = make_adapter(seed=2)
    model, apart = quantized("int8"), quantized("int8")
    for each in (model, apart):
        attach(each, control, "control")
        attach(each, style, "style")
    fuse(model, ["style"])
    assert linear_layers(model)["x_embedder"].packed.shape[1] == 64
    detach(model, "control")
    assert model.config.in_channels == 64
    detach(apart, "control")
    fuse(apart, ["style"])
    assert torch.equal(paint(model), paint(apart)), "what else is attached has no part in it"


def test_norms_that_two_adapters_change(quantized, control, spec):
    name = "transformer_blocks.0.attn.norm_q.weight"
    shift = Adapter(spec, {}, norm_differences={"transformer": {name: torch.full((32,), 0.1)}})
    model = quantized()
    attach(model, control, "control")
    attach(model, shift, "shift")
    with pytest.raises(AdapterError, match="cannot be fused while 'shift' stays attached") as caught:
        fuse(model, ["control"])
    assert name in caught.value.why
    both = model.get_parameter(name).clone()
    fuse(model, ["control", "shift"])
    assert torch.equal(model.get_parameter(name), both)
    attach(model, shift, "more")
    with pytest.raises(AdapterError, match="as things are") as caught:
        unfuse(model)
    assert "changes the same norms" in caught.value.why
    detach(model, "more")
    assert torch.equal(model.get_parameter(name), both)
    unfuse(model)
    assert torch.equal(model.get_parameter(name), both)


# places ---------------------------------------------------------------------------------------------------------------


def test_layers_that_share_a_weight(make_model, make_adapter, paint):
    model, key = make_model(), "transformer_blocks.0.attn.to_k"
    model.get_submodule(key).weight = model.get_submodule(QUERY).weight
    quantize(model, "nf4")
    layers = linear_layers(model)
    shared = layers[QUERY].stored
    assert layers[key].stored is shared
    before = state_of(model)
    attach(model, make_adapter(lambda name: name == QUERY), "style")
    report = fuse(model, ["style"])
    assert report.original_bytes == 0, "the other layer holds it anyway"
    assert layers[key].stored is shared
    assert layers[QUERY].stored is not shared
    unfuse(model)
    assert layers[QUERY].stored is shared
    detach(model, "style")
    both = make_adapter(lambda name: name in (QUERY, key), seed=1)
    attach(model, both, "both")
    assert fuse(model, ["both"]).original_bytes == shared.packed.nbytes
    unfuse(model)
    assert layers[QUERY].stored is layers[key].stored is shared
    detach(model, "both")
    assert_same_state(model, before)


@torch.inference_mode()
@pytest.mark.parametrize("storage", ["bf16", "fp8", "nf4", "nf4-dq", "Q8_0"])
def test_linears_that_run_as_one(storage, make_model, make_adapter, paint):
    """Stored bytes lie side by side in a prepared model, and what is made from them is made anew."""
    config = {"attention_head_dim": 128, "num_attention_heads": 2, "axes_dims_rope": (16, 56, 56)}

    def made():
        model = from_diffusers(make_model(**config))
        quantize(model, storage)
        spec = FluxSpec.from_config(model.config)
        attach(model, make_adapter(lambda name: name.endswith(("to_q", "proj_mlp")), spec=spec), "style")
        return model

    plain, model = made(), made()
    before = {name: layer.packed for name, layer in linear_layers(plain).items()}
    prepare(model, "fp32")
    exact = paint(model)  # products keep what they made
    fuse(model, ["style"])
    fuse(plain, ["style"])
    torch.testing.assert_close(paint(model), paint(plain), rtol=1e-5, atol=5e-5)
    for block in (model.transformer_blocks[0], model.single_transformer_blocks[0]):
        group = block.groups[0]
        assert (group.joined is not None) == (storage != "nf4-dq")
    unfuse(model)
    assert torch.equal(paint(model), exact)
    for name, layer in linear_layers(model).items():
        for role, tensor in layer.packed.tensors.items():
            assert torch.equal(
                tensor.reshape(-1).view(torch.uint8), before[name].tensors[role].reshape(-1).view(torch.uint8)
            )


@torch.inference_mode()
def test_row_scales_of_eight_bit_products_follow(make_model, make_adapter, paint):
    config = {"attention_head_dim": 128, "num_attention_heads": 2, "axes_dims_rope": (16, 56, 56)}
    model, fresh = from_diffusers(make_model(**config)), from_diffusers(make_model(**config))
    spec = FluxSpec.from_config(model.config)
    adapter = make_adapter(lambda name: "attn.to_" in name, spec=spec)
    for each in (model, fresh):
        quantize(each, "nf4")
        attach(each, adapter, "style", 20.0)
    prepare(model, "fp8")
    paint(model)
    fuse(model, ["style"])
    fuse(fresh, ["style"])
    prepare(fresh, "fp8")
    assert torch.equal(paint(model), paint(fresh))


def test_text_encoders(quantized, spec):
    config = CLIPTextConfig(
        vocab_size=20, hidden_size=64, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2
    )
    encoder = CLIPTextModel(config).eval().requires_grad_(False)
    quantize(encoder, {})
    encoders, tokens = {"text_encoder": encoder}, torch.tensor([[3, 5, 7, 1]])
    generator = torch.Generator().manual_seed(1)
    name = "text_model.encoder.layers.0.mlp.fc1"
    adapter = Adapter(spec, {}, text={"text_encoder": {name: low_rank(256, 64, 3, generator)}})
    model, plain = quantized(), encoder(tokens).last_hidden_state
    attach(model, adapter, "text", 1.0, encoders)
    expected = encoder(tokens).last_hidden_state
    with pytest.raises(AdapterError, match="only the transformer was given"):
        fuse(model, ["text"])
    report = fuse(model, ["text"], encoders)
    assert [place.split(".")[0] for place in report.layers] == ["text_encoder"]
    torch.testing.assert_close(encoder(tokens).last_hidden_state, expected, **CLOSE)
    with pytest.raises(AdapterError, match="only the transformer was given"):
        unfuse(model)
    unfuse(model, encoders)
    detach(model, "text", encoders)
    assert torch.equal(encoder(tokens).last_hidden_state, plain)


def test_a_copy_is_its_own(quantized, style, paint):
    model = quantized("nf4")
    plain = paint(model)
    attach(model, style, "style")
    fuse(model, ["style"])
    fused_picture, twin = paint(model), copy.deepcopy(model)
    unfuse(twin)
    detach(twin, "style")
    assert torch.equal(paint(twin), plain)
    assert torch.equal(paint(model), fused_picture)


# errors ---------------------------------------------------------------------------------------------------------------


def refused(model, match, call):
    before, names = state_of(model), list(attached(model))
    with pytest.raises(AdapterError, match=match) as caught:
        call()
    assert caught.value.why
    assert caught.value.next_step
    assert_same_state(model, before)
    assert list(attached(model)) == names
    return caught.value


def test_what_cannot_be_fused(quantized, style, make_adapter):
    model = quantized()
    refused(model, "nothing to fuse", lambda: fuse(model, []))
    refused(model, "No adapter called 'style'", lambda: fuse(model, ["style"]))
    refused(model, "Nothing is fused", lambda: unfuse(model))
    attach(model, style, "style")
    attach(model, make_adapter(seed=9), "other")
    fuse(model, ["style"])
    refused(model, "'style' is fused into this model already", lambda: fuse(model, ["other"]))
    attach(model, make_adapter(seed=8), "style")
    error = refused(model, "as things are", lambda: unfuse(model))
    assert error.next_step == "Detach 'style' first."


def test_without_originals(quantized, style, paint):
    model = quantized()
    attach(model, style, "style")
    expected = paint(model)
    assert fuse(model, ["style"], keep_originals=False).original_bytes == 0
    torch.testing.assert_close(paint(model), expected, **CLOSE)
    error = refused(model, "cannot be brought back", lambda: unfuse(model))
    assert "without keeping the originals" in error.why


def test_a_format_that_is_only_read(quantized, style):
    model = quantized()
    layer = linear_layers(model)[QUERY]
    blocks = torch.zeros(256, 66, dtype=torch.uint8)  # 256 weights a block of IQ2_XXS
    layer.rebase(StoredWeight(Packed("IQ2_XXS", {"blocks": blocks}, (256, 256))), layer.bias)
    attach(model, style, "style")
    error = refused(model, f"into the layer '{QUERY}'", lambda: fuse(model, ["style"]))
    assert "can be read but not packed" in error.why
    assert "Keep the adapter attached" in error.next_step


def test_a_weight_that_is_streamed(quantized, style):
    model = quantized()
    stored = linear_layers(model)[QUERY].stored
    own = {role: stored.tensor(role) for role in stored.roles}
    attach(model, style, "style")
    stored.stream(Slot(torch.device("cpu")), own)
    error = refused(model, f"into the layer '{QUERY}'", lambda: fuse(model, ["style"]))
    assert "streamed from host memory" in error.why
    assert "before the weights are placed" in error.next_step
    stored.settle(own)
    fuse(model, ["style"])
    fused_weight = linear_layers(model)[QUERY].stored
    fused_weight.stream(Slot(torch.device("cpu")), {role: fused_weight.tensor(role) for role in fused_weight.roles})
    assert "streamed" in refused(model, "as things are", lambda: unfuse(model)).why


def test_a_failure_half_way(quantized, style, paint, monkeypatch):
    model = quantized("nf4")
    attach(model, style, "style")
    before, picture = state_of(model), paint(model)
    packed = []

    def fail(weight, storage):
        if len(packed) == 3:
            raise InvalidOptionError("Something is wrong.", "It is.", "Nothing.")
        packed.append(storage)
        return pack(weight, storage)

    with monkeypatch.context() as patch:
        patch.setattr(fuse_layers, "pack", fail)
        with pytest.raises(InvalidOptionError, match=r"Layer '.*': Something is wrong"):
            fuse(model, ["style"])
    assert_same_state(model, before)
    assert not fused_adapters(model)
    assert torch.equal(paint(model), picture)
    fuse(model, ["style"])
