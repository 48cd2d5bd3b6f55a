"""Counts against models that diffusers and transformers build, and against the bytes of packed parts."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from gossamer.demo.embedded import model_folder
from gossamer.memory.model_cost import (
    clip_bytes,
    clip_parameters,
    t5_bytes,
    t5_parameters,
    transformer_bytes,
    transformer_parameters,
    vae_bytes,
    vae_parameters,
)
from gossamer.memory.model_specs import (
    CLIP_L,
    FLUX_DEV,
    FLUX_VAE,
    SCHNELL,
    T5_XXL,
    ClipSpec,
    T5Spec,
    VaeSpec,
    known_model,
)
from gossamer.models.flux_spec import FluxSpec
from gossamer.models.swap import linear_layers, quantize, weight_bytes
from gossamer.pipeline.components import StorageChoice, storage_plan
from gossamer.pipeline.folder import read_json


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("guidance", [True, False])
def test_transformer_parameters(guidance):
    spec = FLUX_DEV if guidance else SCHNELL.transformer
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=guidance)
    assert transformer_parameters(spec) == parameters(model)


def test_text_encoder_parameters():
    t5 = T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    clip = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    with torch.device("meta"):
        assert t5_parameters(T5_XXL) == parameters(T5EncoderModel(t5))
        assert clip_parameters(CLIP_L) == parameters(CLIPTextModel(clip))


@pytest.mark.parametrize(
    ("spec", "quant"), [(FLUX_VAE, False), (VaeSpec((32, 64, 96), 1, 8, quant=True, post_quant=True), True)]
)
def test_vae_parameters(spec, quant):
    with torch.device("meta"):
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(spec.channels),
            up_block_types=("UpDecoderBlock2D",) * len(spec.channels),
            block_out_channels=spec.channels,
            layers_per_block=spec.layers,
            latent_channels=spec.latent,
            use_quant_conv=quant,
            use_post_quant_conv=quant,
        )
    assert vae_parameters(spec) == parameters(model)


@pytest.mark.parametrize("storage", ["bf16", "fp8", "int8", "nf4", "nf4-dq", "Q8_0", "Q4_K"])
def test_transformer_bytes_are_those_of_the_packed_model(storage, embedded_spec):
    """One block of either kind, of the embedded model's sizes, packed as the pipeline packs them, in bf16 otherwise."""
    spec = replace(embedded_spec, num_layers=1, num_single_layers=1)
    config = read_json(model_folder() / "transformer" / "config.json")
    model = FluxTransformer2DModel.from_config({**config, "num_layers": 1, "num_single_layers": 1}).to(torch.bfloat16)
    quantize(model, storage_plan(StorageChoice(storage, "bf16"), "bf16"))
    counted = transformer_bytes(spec, storage)
    assert counted.total == weight_bytes(model)
    assert len(counted.blocks) == spec.num_layers + spec.num_single_layers
    layers = {name: layer.packed.nbytes for name, layer in linear_layers(model).items()}
    single = {name: size for name, size in layers.items() if name.startswith("single_transformer_blocks.0.")}
    assert counted.blocks[1] == sum(size for name, size in single.items() if "norm" not in name)
    endings = ("norm.linear", "norm1.linear", "norm1_context.linear")
    assert counted.modulation == sum(size for name, size in layers.items() if name.endswith(endings))


@pytest.mark.parametrize("storage", ["bf16", "nf4", "Q8_0"])
def test_text_encoder_bytes_are_those_of_the_packed_models(storage):
    folder = model_folder()
    t5, clip = (read_json(folder / name / "config.json") for name in ("text_encoder_2", "text_encoder"))
    models = (
        (T5EncoderModel(T5Config(**t5)), t5_bytes(T5Spec.from_config(t5), storage)),
        (CLIPTextModel(CLIPTextConfig(**clip)), clip_bytes(ClipSpec.from_config(clip), storage)),
    )
    for model, counted in models:
        model.to(torch.bfloat16)
        quantize(model, storage)
        # position ids are integers that no file holds
        buffers = sum(buffer.nbytes for name, buffer in model.named_buffers() if name.endswith("position_ids"))
        assert counted.total == weight_bytes(model) - buffers


def test_vae_bytes_are_those_of_the_file():
    config = read_json(model_folder() / "vae" / "config.json")
    model = AutoencoderKL.from_config(config)
    assert vae_bytes(VaeSpec.from_config(config)) == 2 * parameters(model)


def test_a_plain_flux_dev_is_as_large_as_published():
    # 23.8 GB: diffusion_pytorch_model-0000*-of-00003 of black-forest-labs/FLUX.1-dev
    assert transformer_bytes(FLUX_DEV, "bf16").total == pytest.approx(23.80e9, rel=1e-3)


def test_known_models():
    assert known_model("black-forest-labs/FLUX.1-dev") is known_model("flux.1-dev")
    fill = known_model("FLUX.1-Fill-dev")
    assert fill is not None
    assert fill.transformer == FluxSpec(19, 38, 24, 128, 384, 64, 4096, 768, guidance_embeds=True)
    assert known_model("somebody/FLUX.1-dev") is None
    assert known_model("FLUX.2-dev") is None
