"""Reading is total: every key is used, or an error of three parts says which were not and what the file is for."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from gossamer.adapters import Adapter, LowRankTerm, read_adapter, write_adapter
from gossamer.adapters.peft_settings import KEY
from gossamer.demo.embedded import model_folder
from gossamer.errors import AdapterError, FileDamagedError, FileMissingError, WrongModelError
from gossamer.models.flux_spec import FluxSpec

FULL = FluxSpec(19, 38, 24, 128, 64, 64, 4096, 768, True)
PAIR = {
    "transformer.proj_out.lora_A.weight": torch.ones(2, 256),
    "transformer.proj_out.lora_B.weight": torch.ones(64, 2),
}


@pytest.fixture
def file_of(tmp_path):
    def write(tensors, metadata=None, name="adapter.safetensors"):
        save_file(tensors, tmp_path / name, metadata)
        return tmp_path / name

    return write


def refused(path, spec, error, *matches):
    with pytest.raises(error) as caught:
        read_adapter(path, spec)
    assert type(caught.value) is error
    for part in (caught.value.what, caught.value.why, caught.value.next_step):
        assert part
    assert path.name in caught.value.what, "the message says which file it is about"
    for match in matches:
        assert match in str(caught.value)


def test_bfl_names_behind_diffusion_model(control, file_of, spec, tmp_path):
    write_adapter(control, tmp_path / "plain.safetensors", "bfl")
    path = file_of(
        {f"diffusion_model.{key}": value for key, value in load_file(tmp_path / "plain.safetensors").items()}
    )
    assert read_adapter(path, spec).terms.keys() == control.terms.keys()


def test_alpha(file_of, spec):
    path = file_of({**PAIR, "transformer.proj_out.alpha": torch.tensor(1.0, dtype=torch.bfloat16)})
    assert read_adapter(path, spec).terms["proj_out"].multiplier == 0.5
    assert read_adapter(file_of(PAIR), spec).terms["proj_out"].multiplier == 1.0


@pytest.mark.parametrize(
    ("settings", "multiplier"),
    [
        ({"transformer.lora_alpha": 8}, 4.0),
        ({"transformer.lora_alpha": 8, "transformer.use_rslora": True}, 8 / 2**0.5),
        ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"proj_out": 1}}, 0.5),
        ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"attn.proj_out": 1}}, 4.0),
        ({"text_encoder.lora_alpha": 8}, 1.0),
    ],
)
def test_alpha_in_pefts_settings(file_of, spec, settings, multiplier):
    found = read_adapter(file_of(PAIR, {KEY: json.dumps(settings)}), spec)
    assert found.terms["proj_out"].multiplier == pytest.approx(multiplier)


def test_pefts_settings_that_cannot_be_used(file_of, spec):
    refused(file_of(PAIR, {KEY: json.dumps({"transformer.use_dora": True})}), spec, AdapterError, "DoRA")
    for text in ("{", "[1]", '{"transformer.lora_alpha": "many"}', '{"transformer.alpha_pattern": {"(": 1}}'):
        refused(file_of(PAIR, {KEY: text}), spec, FileDamagedError, KEY)


@pytest.mark.parametrize(
    ("metadata", "name"),
    [
        ({"base_model": "gossamer-tiny"}, "gossamer-tiny"),
        ({"modelspec.architecture": "flux-1-dev/lora", "ss_base_model_version": "flux1"}, "flux-1-dev/lora"),
        ({"ss_base_model_version": "flux1"}, "flux1"),
        ({}, None),
    ],
)
def test_the_base_model_that_the_file_states(file_of, spec, metadata, name):
    assert read_adapter(file_of(PAIR, {"format": "pt", **metadata}), spec).base_model == name


# keys that have no place


@pytest.mark.parametrize(
    ("stem", "family"),
    [
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", "Stable Diffusion U-Net"),
        ("unet.up_blocks.1.attentions.0.proj_in", "Stable Diffusion U-Net"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "Stable Diffusion XL"),
        ("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", "FLUX.2"),
        ("diffusion_model.double_stream_modulation_img.lin", "FLUX.2"),
        ("diffusion_model.joint_blocks.0.x_block.attn.qkv", "Stable Diffusion 3"),
        ("transformer.transformer_blocks.0.img_mlp.net.0.proj", "Qwen-Image"),
        ("diffusion_model.blocks.0.self_attn.q", "Wan"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", "Stable Diffusion XL"),
    ],
)
def test_adapters_for_other_models(file_of, spec, stem, family):
    factors = {f"{stem}.lora_down.weight": torch.ones(2, 8), f"{stem}.lora_up.weight": torch.ones(8, 2)}
    refused(file_of(factors), spec, WrongModelError, family, stem, "1 double and 1 single blocks of width 256")


def test_metadata_is_quoted(file_of, spec):
    factors = {"lora_unet_down_blocks_0.lora_down.weight": torch.ones(2, 8)}
    path = file_of(factors, {"ss_base_model_version": "sdxl_base_v1-0"})
    refused(path, spec, WrongModelError, "the file states 'sdxl_base_v1-0'")


@pytest.mark.parametrize("spelling", ["diffusers", "kohya", "bfl"])
def test_a_full_size_adapter_on_a_small_model(make_adapter, spec, tmp_path, spelling):
    path = tmp_path / "full.safetensors"
    write_adapter(make_adapter(lambda name: name.endswith("norm.linear"), rank=1, spec=FULL), path, spelling)
    refused(path, spec, WrongModelError, "FLUX model of at least 38 single blocks", ", ...")


@pytest.mark.parametrize("spelling", ["diffusers", "kohya", "bfl"])
def test_an_adapter_of_another_width(make_adapter, spec, tmp_path, spelling):
    wider = replace(spec, num_attention_heads=16)
    for wanted in ("attn.to_q", "ff.net.0.proj"):
        path = tmp_path / "wide.safetensors"
        write_adapter(make_adapter(lambda name, wanted=wanted: name.endswith(wanted), spec=wider), path, spelling)
        refused(path, spec, WrongModelError, "another size", "width 256")


def test_an_adapter_with_guidance_on_a_model_without(make_adapter, spec, tmp_path):
    path = tmp_path / "dev.safetensors"
    write_adapter(make_adapter(), path, "kohya")
    refused(path, replace(spec, guidance_embeds=False), WrongModelError, "guidance embedder", "guidance_in")


@pytest.mark.parametrize("channels", [32, 100, 384])
def test_input_channels_that_no_control_lora_has(make_adapter, spec, tmp_path, channels):
    other = replace(spec, in_channels=channels)
    path = tmp_path / "input.safetensors"
    write_adapter(make_adapter(lambda name: name == "x_embedder", spec=other), path)
    refused(path, spec, WrongModelError, "'x_embedder'", f"(256, {channels})")


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_te1_text_model_embeddings_position_embedding.lora_down.weight", "Changes of embeddings"),
        ("text_encoder_2.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.diff", "Changes of embeddings"),
        ("text_encoder.text_model.encoder.layers.0.layer_norm1.lora_A.weight", "Changes of parts of text encoders"),
        ("transformer.proj_out.oft_blocks", "Orthogonal factors"),
        ("lora_unet_img_in.oft_diag", "Orthogonal factors"),
        ("transformer.proj_out.a1.weight", "GLoRA factors"),
        ("transformer.proj_out.on_input", "IA3 scales"),
        ("transformer.proj_out.lora_mid.weight", "Factors of convolutions"),
        ("lycoris_transformer_blocks_0_attn_norm_q.b_norm", "Biases of norms that have none"),
        ("diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale.diff_b", "Biases of norms that have none"),
        ("text_encoder_2.encoder.block.0.layer.0.layer_norm.diff_b", "Biases of norms that have none"),
        ("transformer.proj_out.surprise", "Keys of this kind"),
        ("lora_unet_final_layer_linear.lora_up.weight", "Keys for layers that other keys of the file change already"),
    ],
)
def test_one_key_too_many(file_of, spec, key, kind):
    refused(file_of({**PAIR, key: torch.ones(2, 2)}), spec, AdapterError, key, kind, "1 of the 3 keys")


def test_unused_keys_are_counted_and_the_first_five_named(file_of, spec):
    path = file_of({**PAIR, **{f"odd.{number}": torch.ones(1) for number in range(7)}})
    refused(path, spec, AdapterError, "7 of the 9 keys", "odd.0, odd.1, odd.2, odd.3, odd.4, ...")


def test_the_same_thing_said_twice(file_of, spec):
    path = file_of({**PAIR, "proj_out.lora_A.weight": torch.ones(2, 256)})
    refused(path, spec, AdapterError, "1 of the 3 keys", "proj_out.lora_A.weight")


# values that cannot be


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"lora_B.weight": None}, AdapterError, "no up"),
        ({"lora_A.weight": None}, AdapterError, "no down"),
        ({"lora_A.weight": torch.ones(3, 256)}, AdapterError, "do not fit together"),
        ({"lora_A.weight": torch.ones(2, 256, 1, 1)}, AdapterError, "do not fit together"),
        ({"lora_A.weight": torch.ones(0, 256), "lora_B.weight": torch.ones(64, 0)}, AdapterError, "no rank"),
        ({"lora_A.weight": torch.ones(2, 256, dtype=torch.int8)}, FileDamagedError, "torch.int8"),
        ({"lora_A.weight": torch.full((2, 256), torch.nan)}, FileDamagedError, "not finite"),
        ({"lora_B.weight": torch.ones(65, 2)}, WrongModelError, "(65, 256)"),
        ({"lora_B.bias": torch.ones(3)}, AdapterError, "do not fit together"),
        ({"alpha": torch.ones(2)}, AdapterError, "2 values"),
    ],
)
def test_terms_that_make_no_sense(file_of, spec, changes, error, match):
    tensors = PAIR | {f"transformer.proj_out.{ending}": value for ending, value in changes.items()}
    path = file_of({key: value for key, value in tensors.items() if value is not None})
    refused(path, spec, error, match, "proj_out")


def test_a_norm_scale_of_another_head_size(file_of, spec):
    path = file_of({**PAIR, "transformer.transformer_blocks.0.attn.norm_q.weight": torch.ones(128)})
    refused(path, spec, WrongModelError, "norm_q", "(128,)", "(32,)")


def test_files_that_are_no_adapter(file_of, make_adapter, spec, tmp_path):
    refused(file_of({}), spec, AdapterError, "holds no tensors")
    refused(tmp_path / "none.safetensors", spec, FileMissingError)
    path = tmp_path / "cut.safetensors"
    write_adapter(make_adapter(), path)
    path.write_bytes(path.read_bytes()[:-1])
    refused(path, spec, FileDamagedError, "cut off")


CHECKPOINT_KEYS = {
    "transformer": "transformer_blocks.0.attn.to_q.weight",
    "single": "single_transformer_blocks.0.proj_out.weight",
    "bfl": "double_blocks.0.img_attn.qkv.weight",
    "all in one": "model.diffusion_model.double_blocks.0.img_attn.qkv.weight",
    "vae": "decoder.up_blocks.0.resnets.0.conv1.weight",
    "bfl vae": "encoder.down.0.block.0.conv1.weight",
    "old vae": "first_stage_model.decoder.mid.attn_1.k.weight",
    "clip": "text_model.encoder.layers.0.mlp.fc1.weight",
    "t5": "encoder.block.0.layer.0.SelfAttention.q.weight",
    "unet": "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
    "old unet": "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight",
}


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        (["transformer"], "a checkpoint of a transformer;"),
        (["single"], "a checkpoint of a transformer;"),
        (["bfl"], "a checkpoint of a transformer;"),
        (["all in one", "old vae"], "a checkpoint of a transformer and a VAE;"),
        (["vae"], "a checkpoint of a VAE;"),
        (["bfl vae"], "a checkpoint of a VAE;"),
        (["clip"], "a checkpoint of a text encoder;"),
        (["t5"], "a checkpoint of a text encoder;"),
        (["clip", "t5"], "a checkpoint of a text encoder;"),
        (["unet"], "a checkpoint of a U-Net;"),
        (["old unet", "old vae"], "a checkpoint of a U-Net and a VAE;"),
    ],
)
def test_checkpoints_are_not_adapters(file_of, spec, kinds, words):
    path = file_of({CHECKPOINT_KEYS[kind]: torch.ones(2, 2) for kind in kinds})
    refused(path, spec, AdapterError, "is not an adapter", words, "named with --model")


def test_what_is_neither_adapter_nor_known_checkpoint(file_of, spec):
    path = file_of({"head.weight": torch.ones(2, 2)})
    refused(path, spec, AdapterError, "is not an adapter", "None of its 1 keys is part of one; the first is 'head")


@pytest.mark.parametrize(
    "ending", ["lora_down.weight", "lokr_w1", "hada_w1_a", "dora_scale", "diff", "oft_blocks", "on_input", "alpha"]
)
def test_layers_that_the_model_does_not_have(file_of, spec, ending):
    path = file_of({f"odd_layer.{ending}": torch.ones(2, 2)})
    refused(path, spec, AdapterError, "1 of the 1 keys", "cannot be used")


def test_the_files_of_the_embedded_model_are_not_adapters(spec):
    words = {"vae": "a VAE", "transformer": "a transformer", "text_encoder": "a text encoder"}
    for part, looks in {**words, "text_encoder_2": "a text encoder"}.items():
        for path in (model_folder() / part).glob("*.safetensors"):
            refused(path, spec, AdapterError, "is not an adapter", f"a checkpoint of {looks};")


def test_an_adapter_made_in_memory_is_checked_too(spec):
    term = LowRankTerm(torch.ones(2, 256), torch.ones(64, 2))
    assert Adapter(spec, {"proj_out": term}).sha256 is None
    with pytest.raises(WrongModelError, match="surprise"):
        Adapter(spec, {"surprise": term})
    with pytest.raises(WrongModelError, match="another size"):
        Adapter(spec, {"norm_out.linear": term})
