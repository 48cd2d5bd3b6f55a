"""The embedded model in every layout that files are found in: loaded, it paints the same pixels as the folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from layout_models import QUICK, folder_of, folder_with, is_quantised, paint, transformer
from safetensors.torch import save_file

import checkpoint_writer as writer
import gossamer
from gossamer.demo.embedded import model_folder
from gossamer.errors import FileDamagedError, FileMissingError, InvalidOptionError, WrongModelError
from gossamer.formats import pack
from gossamer.models.flux import FluxTransformer
from gossamer.pipeline.model import open_model
from gossamer.pipeline.options import LoadOptions, PaintOptions
from gossamer.pipeline.prepare import prepare

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer")


@pytest.fixture(scope="module")
def expected():
    return paint("embedded")


# plain layouts --------------------------------------------------------------------------------------------------------


def bfl(path):
    return writer.save(path / "flux.safetensors", writer.to_bfl(transformer()))


def shards(path):
    return writer.save_shards(path, writer.to_bfl(transformer()))[1]


def index(path):
    files = writer.save_shards(path, transformer())
    places = dict.fromkeys(transformer(), files[0].name) | {"proj_out.bias": files[1].name}
    path = path / "flux.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path


def component(path):
    return Path(shutil.copytree(model_folder() / "transformer", path / "transformer"))


def prefixed(path):
    named = {f"{writer.PREFIX}{name}": tensor for name, tensor in writer.to_bfl(transformer()).items()}
    return writer.save(path / "flux.sft", named)


def float32_gguf(path):
    return writer.save_gguf(path / "flux.gguf", writer.to_bfl(transformer()), {}, "flux")


PLAIN = {
    "bfl": bfl,
    "shards": shards,
    "index of shards": index,
    "component folder": component,
    "behind a prefix": prefixed,
    "GGUF F32": float32_gguf,
}


@pytest.mark.parametrize("layout", PLAIN)
def test_plain_layouts_paint_the_same_pixels(tmp_path, layout, expected):
    assert (paint(PLAIN[layout](tmp_path), base="embedded") == expected).all()


def test_a_file_can_be_packed_as_a_folder_is(tmp_path):
    packed = paint(bfl(tmp_path), base="embedded", storage="nf4")
    assert (packed == paint("embedded", storage="nf4")).all()


# one tensor a weight --------------------------------------------------------------------------------------------------


def as_stored(state, dtype):
    """Weights of a type, and vectors in float32."""
    return {name: tensor.to(dtype) if tensor.dim() == 2 else tensor.float() for name, tensor in state.items()}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_without_scales(tmp_path, dtype):
    """All tensors in fp8, vectors too, as the first such files are."""
    named = {name: tensor.to(dtype) for name, tensor in writer.to_bfl(transformer()).items()}
    values = writer.from_bfl({name: tensor.float() for name, tensor in named.items()}, transformer())
    file = writer.save(tmp_path / "fp8.safetensors", named)
    pipe = gossamer.load(file, base="embedded")
    assert set(pipe.report.packed.values()) == {"fp8" if dtype == torch.float8_e4m3fn else "fp8_e5m2"}
    pixels = np.asarray(pipe("a red sphere on top of a blue cube", **QUICK))
    assert (pixels == paint(folder_with(tmp_path / "model", "transformer", values))).all()
    assert pipe.kept_layers == {}


def test_types_mixed_in_one_file(tmp_path):
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    named = {
        name: tensor.to(dtypes[place % 3]) for place, (name, tensor) in enumerate(writer.to_bfl(transformer()).items())
    }
    values = writer.from_bfl({name: tensor.float() for name, tensor in named.items()}, transformer())
    file = writer.save(tmp_path / "mixed.safetensors", named)
    prepared = prepare(LoadOptions(model=str(file), base="embedded"))
    assert prepared.storage.transformer == "stored", "no one format keeps all weights as they are"
    pipe = gossamer.load(file, base="embedded")
    assert set(pipe.report.packed.values()) == {"fp32", "fp16", "bf16"}
    pixels = np.asarray(pipe("a red sphere on top of a blue cube", **QUICK))
    assert (pixels == paint(folder_with(tmp_path / "model", "transformer", values))).all()


def city96(state, kind="Q8_0"):
    """Embedders and the last layer BF16, vectors F32, all else in blocks; one layer in other blocks."""
    types = {name: kind for name, tensor in state.items() if tensor.dim() == 2}
    types |= {name: "BF16" for name, tensor in state.items() if tensor.dim() == 2 and name.startswith(SMALL)}
    return types | {"double_blocks.0.img_attn.qkv.weight": "Q5_1"}


def stable_diffusion_cpp(state):
    return {f"{writer.PREFIX}{name}": kind for name, kind in city96(state, "Q4_0").items()}


def everything(state):
    """Inputs quantised too."""
    return {name: "Q4_1" for name, tensor in state.items() if tensor.dim() == 2}


GGUF = {
    "city96": ("flux", "", city96),
    "stable-diffusion.cpp": (None, writer.PREFIX, stable_diffusion_cpp),
    "pig": ("pig", "", everything),
    "diffusers names": ("cow", None, everything),
}


@pytest.mark.parametrize("layout", GGUF)
def test_gguf(tmp_path, layout):
    arch, prefix, choose = GGUF[layout]
    state = transformer()
    named = state if prefix is None else writer.to_bfl(state)
    types = choose(named)
    tensors = {f"{prefix or ''}{name}": tensor for name, tensor in named.items()}
    file = writer.save_gguf(tmp_path / "flux.gguf", tensors, types, arch)
    values = writer.gguf_values(tensors, types)
    values = {name.removeprefix(prefix or ""): tensor for name, tensor in values.items()}
    values = values if prefix is None else writer.from_bfl(values, state)
    pipe = gossamer.load(file, base="embedded")
    kinds = set(pipe.report.packed.values())
    assert kinds == {kind.lower() if kind == "BF16" else kind for kind in types.values()}
    pixels = np.asarray(pipe("a red sphere on top of a blue cube", **QUICK))
    assert (pixels == paint(folder_with(tmp_path / "model", "transformer", values))).all()


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "IQ4_XS"])
def test_gguf_types_with_super_blocks(tmp_path, kind):
    """The gguf package cannot make these bytes, but it decodes them."""
    state = writer.to_bfl(transformer())
    types = {name: kind for name, tensor in state.items() if tensor.dim() == 2 and tensor.shape[1] % 256 == 0}
    made = {name: pack(state[name], kind).tensors["blocks"].numpy() for name in types}
    file = writer.save_gguf(tmp_path / "flux.gguf", state, types, "flux", made)
    values = writer.from_bfl(writer.gguf_values(state, types, made), transformer())
    reference = folder_with(tmp_path / "model", "transformer", values)
    assert (paint(file, base="embedded") == paint(reference)).all()


@pytest.mark.parametrize("kind", ["IQ2_XXS", "TQ2_0"])
def test_gguf_types_that_are_only_read_stay_as_stored(tmp_path, kind):
    """Their blocks are decoded in torch; nothing packs them, so no one format can be named for the file."""
    state = writer.to_bfl(transformer())
    kinds = {name: ("F32" if tensor.dim() == 1 else kind) for name, tensor in state.items()}
    kinds |= {name: "F32" for name in kinds if name.startswith(SMALL)}
    file = writer.save_gguf_hole(
        tmp_path / "flux.gguf", {name: (kinds[name], tuple(state[name].shape)) for name in state}, "flux"
    )
    prepared = prepare(LoadOptions(model=str(file), base="embedded"))
    assert prepared.storage.transformer == "stored"
    (remark,) = prepared.model.remarks()
    assert f"stay as {kind}, which is decoded in torch" in remark
    pipe = gossamer.load(file, base="embedded")
    layer = gossamer.linear_layers(pipe.transformer)["single_transformer_blocks.0.proj_mlp"]
    assert layer.packed.format == kind
    assert not layer.weight.any()


# several tensors a weight ---------------------------------------------------------------------------------------------


def four_bit(name, weight, kind="nf4", nested=False):
    """A weight as bitsandbytes saves it, and what it stands for by bitsandbytes."""
    codes, state = bnb.quantize_4bit(weight.float(), quant_type=kind, compress_statistics=nested)
    tensors = {name: codes} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    return tensors, bnb.dequantize_4bit(codes, state)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False], ids=["v1", "v2"])
def test_four_bits_of_forge(tmp_path, kind, nested):
    """The fused weights are four-bit lines that are cut between q, k and v; `img_in` is packed too."""
    state, tensors, values = writer.to_bfl(transformer()), {}, {}
    for name, tensor in state.items():
        plain = {name: tensor}, tensor.float()
        packed, decoded = plain if tensor.dim() == 1 else four_bit(name, tensor, kind, nested)
        tensors |= {f"{writer.PREFIX}{key}": value for key, value in packed.items()}
        values[name] = decoded
    file = writer.save(tmp_path / f"{kind}.safetensors", tensors)
    pipe = gossamer.load(file, base="embedded")
    assert pipe.report.packed["transformer_blocks.0.attn.to_k"] == (f"{kind}-dq" if nested else kind)
    pixels = np.asarray(pipe("a red sphere on top of a blue cube", **QUICK))
    reference = folder_with(tmp_path / "model", "transformer", writer.from_bfl(values, transformer()))
    assert np.abs(pixels.astype(int) - paint(reference)).max() <= 1, "bitsandbytes rounds its nested scales elsewhere"


def test_scaled_fp8(tmp_path):
    tensors, values = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}, {}
    for name, tensor in writer.to_bfl(transformer()).items():
        if tensor.dim() == 1:
            tensors[name], values[name] = tensor, tensor.float()
            continue
        scale = tensor.float().abs().max() / 448
        codes = (tensor.float() / scale).to(torch.float8_e4m3fn)
        tensors |= {name: codes, name.removesuffix("weight") + "scale_weight": scale}
        values[name] = codes.float() * scale
    file = writer.save(tmp_path / "scaled.safetensors", tensors)
    reference = folder_with(tmp_path / "model", "transformer", writer.from_bfl(values, transformer()))
    assert (paint(file, base="embedded") == paint(reference)).all()


def test_component_folders_of_bitsandbytes(tmp_path):
    """The transformer and T5 of one folder in four bits, with the config that diffusers writes beside them."""
    stored, decoded = ({part: {} for part in ("transformer", "text_encoder_2")} for _ in range(2))
    for part in stored:
        for name, tensor in writer.read_component(model_folder(), part).items():
            is_packed = is_quantised(name, tensor)
            packed, decoded[part][name] = four_bit(name, tensor) if is_packed else ({name: tensor}, tensor)
            stored[part] |= packed
    copy = folder_of(tmp_path / "bnb", stored, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    reference = folder_of(tmp_path / "decoded", decoded)
    pipe = gossamer.load(copy)
    assert pipe.report.packed["transformer_blocks.0.attn.to_q"] == "nf4"
    encoder = gossamer.linear_layers(pipe.components["text_encoder_2"])
    assert {layer.packed.format for layer in encoder.values()} == {"nf4"}
    assert (np.asarray(pipe("a red sphere on top of a blue cube", **QUICK)) == paint(reference)).all()


# all in one -----------------------------------------------------------------------------------------------------------


def test_text_encoders_and_autoencoder_inside_are_used(tmp_path):
    """Each is changed a little, so that those of the base model would paint something else."""
    reference = Path(shutil.copytree(model_folder(), tmp_path / "model"))
    for part, name in (("text_encoder", "text_model.final_layer_norm.weight"), ("text_encoder_2", "shared.weight"),
                       ("vae", "decoder.conv_out.weight")):  # fmt: skip
        tensors = writer.read_component(reference, part)
        (file,) = (reference / part).glob("*.safetensors")
        save_file(tensors | {name: (tensors[name].float() * 0.75).to(tensors[name].dtype)}, file, {"format": "pt"})
    tensors = writer.all_in_one(reference) | {
        "text_encoders.clip_l.logit_scale": torch.zeros(()),
        "text_encoders.clip_l.transformer.text_projection.weight": torch.zeros(128, 128),
    }
    file = writer.save(tmp_path / "all.safetensors", tensors)
    model = open_model(str(file), "embedded")
    assert set(model.unneeded) == {
        "text_encoders.clip_l.logit_scale",
        "text_encoders.clip_l.transformer.text_projection.weight",
    }
    assert len(model.remarks()) == 2
    pixels = paint(file, base="embedded")
    assert (pixels == paint(reference)).all()
    assert (pixels != paint("embedded")).any()


def folders_in_one_file():
    """The components of a diffusers folder behind their own names, nothing renamed."""
    return {
        f"{part}.{name}": tensor
        for part in ("transformer", "text_encoder", "text_encoder_2", "vae")
        for name, tensor in writer.read_component(model_folder(), part).items()
    }


# what stands before the components' names: of the transformer, CLIP, T5 and the autoencoder
PREFIXES = {
    "older": ("diffusion_model.", "cond_stage_model.clip_l.transformer.", "cond_stage_model.t5xxl.transformer.",
              "first_stage_model."),
    "conditioner": ("transformer.", "conditioner.embedders.0.transformer.", "conditioner.embedders.1.transformer.",
                    "first_stage_model."),
    "short": (writer.PREFIX, "text_encoders.clip_l.", "text_encoders.t5xxl.", "vae."),
}  # fmt: skip


@pytest.mark.parametrize("prefixes", [*PREFIXES, "folders"])
def test_all_in_one_behind_other_prefixes(tmp_path, prefixes, expected):
    tensors = writer.all_in_one(model_folder(), *PREFIXES[prefixes]) if prefixes in PREFIXES else folders_in_one_file()
    file = writer.save(tmp_path / "all.safetensors", tensors)
    assert not open_model(str(file), "embedded").unneeded
    assert (paint(file, base="embedded") == expected).all()


def test_an_all_in_one_gguf(tmp_path, expected):
    file = writer.save_gguf(tmp_path / "all.gguf", writer.all_in_one(model_folder()), {}, None)
    assert (paint(file, base="embedded") == expected).all()


# the base model -------------------------------------------------------------------------------------------------------


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileMissingError, match=r"lacks the scheduler, CLIP's tokenizer.*the autoencoder") as caught:
        gossamer.load(bfl(tmp_path))
    assert "--base" in caught.value.next_step
    file = writer.save(tmp_path / "all.safetensors", writer.all_in_one(model_folder()))
    with pytest.raises(FileMissingError, match="the autoencoder's config"):
        gossamer.load(file)


def test_a_base_that_nothing_is_taken_from_is_refused():
    with pytest.raises(InvalidOptionError, match="has every part itself"):
        gossamer.load("embedded", base="embedded")


def test_a_file_is_no_base(tmp_path):
    file = bfl(tmp_path)
    with pytest.raises(WrongModelError, match="cannot be a base model"):
        gossamer.load(file, base=str(file))


def test_a_base_of_another_kind_is_refused(tmp_path):
    """Without a guidance embedder it is a schnell, whose scheduler steps otherwise."""
    state = {name: tensor for name, tensor in transformer().items() if "guidance_embedder" not in name}
    file = writer.save(tmp_path / "schnell.safetensors", writer.to_bfl(state))
    with pytest.raises(WrongModelError, match=r"a model without guidance, as FLUX\.1-schnell is"):
        gossamer.load(file, base="embedded")


def test_a_base_of_other_sizes_is_refused(tmp_path):
    state = transformer()
    state["context_embedder.weight"] = state["context_embedder.weight"].repeat(1, 2)
    file = writer.save(tmp_path / "wide.safetensors", writer.to_bfl(state))
    with pytest.raises(WrongModelError, match="It gives 256 features a text token; the transformer reads 512"):
        gossamer.load(file, base="embedded")


def test_recipe_and_hashes_hold_both(tmp_path):
    file = bfl(tmp_path)
    prepared = prepare(LoadOptions(model=str(file), base="embedded"))
    use = prepared.recipe(PaintOptions("a red ball")).model
    assert (use.source, use.base) == (str(file), "embedded")
    own, other = prepared.model.hashes(), open_model("embedded").hashes()
    assert {part for part in own if own[part] != other[part]} == {"transformer"}


# what is refused ------------------------------------------------------------------------------------------------------

FAMILIES = {
    "FLUX.2": "double_stream_modulation_img.lin.weight",
    "Stable Diffusion XL": "conditioner.embedders.1.model.ln_final.weight",
    "Stable Diffusion 3": "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
    "a Stable Diffusion U-Net": "model.diffusion_model.input_blocks.0.0.weight",
    "Chroma": "distilled_guidance_layer.in_proj.weight",
    "an adapter": "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
    "the T5 text encoder alone": "encoder.block.0.layer.0.SelfAttention.q.weight",
    "the CLIP text encoder alone": "text_model.embeddings.token_embedding.weight",
    "the autoencoder alone": "decoder.conv_in.weight",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_models_are_named(tmp_path, family):
    file = writer.save(tmp_path / "other.safetensors", {FAMILIES[family]: torch.zeros(2, 2)})
    with pytest.raises(WrongModelError, match=family):
        gossamer.load(file, base="embedded")


def test_a_tensor_that_nothing_reads(tmp_path):
    state = writer.to_bfl(transformer()) | {"double_blocks.0.img_attn.extra.weight": torch.zeros(2, 2)}
    file = writer.save(tmp_path / "odd.safetensors", state)
    with pytest.raises(FileDamagedError, match=r"1 of the .*double_blocks.0.img_attn.extra.weight"):
        gossamer.load(file, base="embedded")


def test_a_tensor_that_is_missing(tmp_path):
    state = writer.to_bfl(transformer())
    del state["single_blocks.1.linear1.bias"]
    file = writer.save(tmp_path / "less.safetensors", state)
    with pytest.raises(FileDamagedError, match=r"lacks 4 tensors of the transformer(.|\n)*single_transformer_blocks.1"):
        gossamer.load(file, base="embedded")


def test_a_weight_of_another_shape(tmp_path):
    state = writer.to_bfl(transformer())
    state["single_blocks.1.linear2.weight"] = torch.zeros(256, 12)
    file = writer.save(tmp_path / "shape.safetensors", state)
    with pytest.raises(FileDamagedError, match=r"single_transformer_blocks.1.proj_out.weight is \(256, 12\)"):
        gossamer.load(file, base="embedded")


def test_a_file_that_is_cut_off(tmp_path):
    file = bfl(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FileDamagedError, match="cut off"):
        gossamer.load(file, base="embedded")


@pytest.mark.parametrize("storage", ["stored", "nf4"])
def test_a_weight_that_is_not_finite(tmp_path, storage):
    state = writer.to_bfl(transformer())
    state["single_blocks.1.linear2.weight"][3, 5] = float("nan")
    file = writer.save(tmp_path / "nan.safetensors", state)
    with pytest.raises(InvalidOptionError, match=r"'single_transformer_blocks\.1\.proj_out': A weight with NaN"):
        gossamer.load(file, base="embedded", storage=storage)


# the transformer alone ------------------------------------------------------------------------------------------------


def fill_model(path):
    """The embedded model's transformer with the inputs of FLUX.1-Fill and heads as FLUX.1 has them."""
    torch.manual_seed(0)
    model = FluxTransformer(
        in_channels=384, out_channels=64, num_layers=1, num_single_layers=1, num_attention_heads=1,
        joint_attention_dim=256, pooled_projection_dim=128, guidance_embeds=True,
    )  # fmt: skip
    return model, writer.save(path / "fill.safetensors", writer.to_bfl(model.state_dict()))


def test_fill_loads_through_the_python_interface_only(tmp_path):
    model, file = fill_model(tmp_path)
    with pytest.raises(WrongModelError, match="whose pipeline Gossamer does not have yet") as caught:
        gossamer.load(file, base="embedded")
    assert "gossamer.load_transformer" in caught.value.next_step
    loaded = gossamer.load_transformer(file, storage="int8", skip=["x_embedder"])
    assert loaded.config.in_channels == 384
    layers = gossamer.linear_layers(loaded)
    assert layers["single_transformer_blocks.0.proj_out"].packed.format == "int8"
    assert torch.equal(layers["x_embedder"].weight, model.x_embedder.weight)


def test_load_transformer_from_a_folder():
    whole, alone = (gossamer.load_transformer(path) for path in (model_folder(), model_folder() / "transformer"))
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in alone.state_dict().items())
