"""Names and rows of every layout, against diffusers' own conversions, and on full-size files whose data is a hole."""

from __future__ import annotations

import json

import bitsandbytes
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_vae_checkpoint,
)

import checkpoint_writer as writer
from gossamer.checkpoints.checkpoint import open_checkpoint
from gossamer.demo.embedded import model_folder
from gossamer.errors import FileDamagedError, FileMissingError, WrongModelError
from gossamer.formats.four_bit import NF4_VALUES
from gossamer.models.fill import STORED, Target, fill
from gossamer.models.flux import FluxTransformer
from gossamer.models.flux_config import config_from_weights

W = 3072
META = Target({"*": STORED}, torch.float32, torch.device("meta"))


def narrow(columns=2):
    """A transformer of FLUX.1's width and two blocks, with few columns: conversions move whole rows."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        name: (shape[0], columns) if len(shape) == 2 else shape
        for name, shape in writer.full_size().items()
        if not any(part.isdigit() and int(part) > 0 for part in name.split(".")[1:2])
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_bfl_names_and_rows_are_those_of_diffusers(tmp_path):
    state = narrow()
    bfl = writer.to_bfl(state)
    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(bfl))
    assert theirs.keys() == state.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in state.items())
    component = open_checkpoint(writer.save(tmp_path / "bfl.safetensors", bfl)).components["transformer"]
    assert component.names == state.keys()
    for name, tensor in component.stream():
        assert torch.equal(tensor, state.pop(name)), name
    assert not state


def test_autoencoder_names_are_those_of_diffusers(tmp_path):
    state = writer.read_component(model_folder(), "vae")
    config = json.loads((model_folder() / "vae" / "config.json").read_text())
    named = writer.to_latent_diffusion(state)
    theirs = convert_ldm_vae_checkpoint(dict(named), config)
    assert theirs.keys() == state.keys()
    assert all(torch.equal(theirs[name].reshape(tensor.shape), tensor) for name, tensor in state.items())
    prefixed = {f"first_stage_model.{name}": tensor for name, tensor in named.items()}
    component = open_checkpoint(writer.save(tmp_path / "vae.safetensors", prefixed)).components["vae"]
    got = dict(component.stream())
    assert got.keys() == state.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("component", "prefix"),
    [
        ("text_encoder", "text_encoders.clip_l.transformer."),
        ("text_encoder", "text_encoders.clip_l."),
        ("text_encoder", "conditioner.embedders.0.transformer."),
        ("text_encoder", "cond_stage_model.clip_l.transformer."),
        ("text_encoder_2", "text_encoders.t5xxl.transformer."),
        ("text_encoder_2", "conditioner.embedders.1.transformer."),
        ("text_encoder_2", "text_encoders.t5xxl."),
        ("vae", "vae."),
        ("vae", "first_stage_model."),
    ],
)
def test_parts_beside_the_transformer_by_prefix(tmp_path, component, prefix):
    state = writer.read_component(model_folder(), component)
    named = {f"{prefix}{name}": torch.zeros(1) for name in state}
    opened = open_checkpoint(writer.save(tmp_path / "part.safetensors", named))
    assert (opened.unknown, list(opened.components)) == ((), [component])
    assert opened.components[component].names == state.keys()


# full-size files ------------------------------------------------------------------------------------------------------


def plain(dtype, inputs=64, guidance=True, prefix="", diffusers=False):
    shapes = writer.full_size(inputs, guidance) if diffusers else writer.full_size_bfl(inputs, guidance)
    return {f"{prefix}{name}": (dtype, shape) for name, shape in shapes.items()}


def mixed():
    kinds = {1: "F32", 2: "BF16"}
    tensors = {name: (kinds[len(shape)], shape) for name, shape in writer.full_size_bfl().items()}
    return tensors | {"img_in.weight": ("F16", (W, 64))}


def scaled(prefix=writer.PREFIX):
    """ComfyUI's first spelling: e4m3 everywhere, two scales a weight, one marker a file."""
    tensors = plain("F8_E4M3", prefix=prefix)
    for name in [name for name in tensors if name.endswith(".weight")]:
        for scale in ("scale_weight", "scale_input"):
            tensors[name.removesuffix("weight") + scale] = ("F32", ())
    return tensors | {f"{prefix}scaled_fp8": ("F8_E4M3", (0,))}


def scaled_contents(prefix=writer.PREFIX):
    one = torch.ones(()).numpy().tobytes()
    return {name: one for name in scaled(prefix) if name.endswith(".scale_weight")}


def four_bit():
    """Forge's first version: codes, scales of blocks that are codes too, maps and a description for every weight."""
    tensors, contents = {}, {}
    values = torch.tensor(NF4_VALUES).numpy().tobytes()
    nested = bitsandbytes.functional.create_dynamic_map().numpy().tobytes()
    said = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "nested_blocksize": 256}
    said |= {"nested_dtype": "float32", "nested_offset": 0.0}
    for name, shape in writer.full_size_bfl().items():
        name = f"{writer.PREFIX}{name}"
        if len(shape) == 1:
            tensors[name] = ("BF16", shape)
            continue
        count = shape[0] * shape[1]
        text = json.dumps(said | {"shape": shape}).encode()
        tensors |= {
            name: ("U8", (count // 2, 1)),
            f"{name}.absmax": ("U8", (count // 64,)),
            f"{name}.quant_map": ("F32", (16,)),
            f"{name}.nested_absmax": ("F32", (-(-count // 64 // 256),)),
            f"{name}.nested_quant_map": ("F32", (256,)),
            f"{name}.quant_state.bitsandbytes__nf4": ("U8", (len(text),)),
        }
        contents |= {f"{name}.quant_map": values, f"{name}.nested_quant_map": nested}
        contents[f"{name}.quant_state.bitsandbytes__nf4"] = text
    return tensors, contents


def blocks(kind, prefix="", diffusers=False, inputs_too=False):
    """As city96's conversion chooses types: embedders and the last layer BF16, vectors F32, all else in blocks."""
    shapes = writer.full_size() if diffusers else writer.full_size_bfl()
    small = ("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer")
    small += ("x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out")
    tensors = {}
    for name, shape in shapes.items():
        wide = "BF16" if name.startswith(small) and not inputs_too else kind
        wide = "F16" if shape[-1] % 256 else wide
        tensors[f"{prefix}{name}"] = ("F32" if len(shape) == 1 else wide, shape)
    return tensors


FILES = {
    "bfl": lambda path: writer.save_hole(path, plain("BF16")),
    "schnell": lambda path: writer.save_hole(path, plain("BF16", guidance=False)),
    "control": lambda path: writer.save_hole(path, plain("BF16", inputs=128)),
    "fill": lambda path: writer.save_hole(path, plain("BF16", inputs=384)),
    "diffusers": lambda path: writer.save_hole(path, plain("F16", diffusers=True)),
    "diffusers behind a prefix": lambda path: writer.save_hole(
        path, plain("F16", prefix="transformer.", diffusers=True)
    ),
    "all-in-one": lambda path: writer.save_hole(path, plain("BF16", prefix=writer.PREFIX)),
    "fp8 without scales": lambda path: writer.save_hole(path, plain("F8_E4M3")),
    "e5m2 without scales": lambda path: writer.save_hole(path, plain("F8_E5M2", prefix=writer.PREFIX)),
    "types mixed": lambda path: writer.save_hole(path, mixed()),
    "scaled fp8": lambda path: writer.save_hole(path, scaled(), scaled_contents()),
    "NF4": lambda path: writer.save_hole(path, *four_bit()),
    "GGUF Q8_0": lambda path: writer.save_gguf_hole(path, blocks("Q8_0"), "flux"),
    "GGUF Q4_K, stable-diffusion.cpp": lambda path: writer.save_gguf_hole(path, blocks("Q4_K", writer.PREFIX), None),
    "GGUF Q2_K, diffusers names": lambda path: writer.save_gguf_hole(path, blocks("Q2_K", diffusers=True), "pig"),
    "GGUF IQ4_XS, inputs too": lambda path: writer.save_gguf_hole(path, blocks("IQ4_XS", inputs_too=True), "cow"),
    "GGUF IQ2_XXS": lambda path: writer.save_gguf_hole(path, blocks("IQ2_XXS"), "flux"),
    "GGUF TQ1_0": lambda path: writer.save_gguf_hole(path, blocks("TQ1_0"), "flux"),
}


@pytest.mark.parametrize("layout", FILES)
def test_every_key_of_a_full_size_file_is_used(tmp_path, layout):
    """The whole way into a model: on the meta device nothing of the file's data is read but scales and descriptions."""
    path = FILES[layout](tmp_path / ("flux.gguf" if layout.startswith("GGUF") else "flux.safetensors"))
    checkpoint = open_checkpoint(path)
    assert (checkpoint.unknown, checkpoint.unneeded) == ((), {})
    component = checkpoint.components["transformer"]
    inputs = {"control": 128, "fill": 384}.get(layout, 64)
    expected = writer.full_size(inputs, guidance=layout != "schnell")
    assert component.names == expected.keys()
    config = config_from_weights(component)
    assert (config["in_channels"], config["out_channels"]) == (inputs, 64)
    assert (config["guidance_embeds"], config["num_layers"]) == (layout != "schnell", 19)
    with torch.device("meta"):
        model = FluxTransformer(**config)
    report = fill(model, component.stream(), META, str(path))
    assert len(report.packed) == sum(len(shape) == 2 for shape in expected.values())
    assert report.packed == {
        name.removesuffix(".weight"): kind.replace("bitsandbytes 4-bit", "nf4-dq").replace("scaled fp8", "fp8")
        for name, kind in component.storage().items()
        if len(expected[name]) == 2
    }


# what is refused ------------------------------------------------------------------------------------------------------


def test_two_tensors_of_one_name(tmp_path):
    tensors = {"img_in.weight": torch.zeros(4, 4), f"{writer.PREFIX}img_in.weight": torch.zeros(4, 4)}
    with pytest.raises(FileDamagedError, match=r"are the same weight, 'x_embedder\.weight'"):
        open_checkpoint(writer.save(tmp_path / "twice.safetensors", tensors))


def test_both_namings_in_one_file(tmp_path):
    tensors = {"img_in.weight": torch.zeros(4, 4), "x_embedder.weight": torch.zeros(4, 4)}
    with pytest.raises(FileDamagedError, match="are the same weight"):
        open_checkpoint(writer.save(tmp_path / "twice.safetensors", tensors))


def test_rows_that_do_not_make_up_the_parts(tmp_path):
    tensors = writer.to_bfl(narrow()) | {"double_blocks.0.img_attn.qkv.weight": torch.zeros(100, 2)}
    component = open_checkpoint(writer.save(tmp_path / "odd.safetensors", tensors)).components["transformer"]
    with pytest.raises(FileDamagedError, match="100 rows"):
        list(component.stream())


def test_shards_open_together_and_all_must_be_there(tmp_path):
    state = narrow()
    first, second = writer.save_shards(tmp_path, writer.to_bfl(state))
    for shard in (first, second):
        assert open_checkpoint(shard).components["transformer"].names == state.keys()
    second.unlink()
    with pytest.raises(FileMissingError, match="1 of its 2 shards are missing: flux-00002-of-00002"):
        open_checkpoint(first)


def test_a_shard_that_repeats_a_tensor(tmp_path):
    tensors = {"img_in.bias": torch.zeros(4)}
    for number in (1, 2):
        writer.save(tmp_path / f"flux-{number:05}-of-00002.safetensors", tensors)
    with pytest.raises(FileDamagedError, match="which another shard holds too"):
        open_checkpoint(tmp_path / "flux-00001-of-00002.safetensors")


@pytest.mark.parametrize("name", ["../flux.safetensors", "/etc/passwd", "..", "a/b.safetensors"])
def test_an_index_cannot_leave_its_folder(tmp_path, name):
    index = tmp_path / "flux.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"img_in.weight": name}}))
    with pytest.raises(FileDamagedError, match="no file of its folder"):
        open_checkpoint(index)


def test_heads_of_another_size_need_a_config():
    class Weights:
        names = frozenset(("x_embedder.weight", "transformer_blocks.0.attn.norm_q.weight"))

        def shape(self, name):
            return (256, 64) if name == "x_embedder.weight" else (32,)

    with pytest.raises(WrongModelError, match="heads of 32 channels"):
        config_from_weights(Weights())
