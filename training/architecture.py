"""The embedded model's architecture: FLUX.1's classes at a small size, and its standard diffusers folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

WIDTH = 256  # a multiple of 256, so that every GGUF block type fits
POOLED_WIDTH = 128
PICTURE_SIZE = 256
TEXT_TOKENS = 64
CLIP_TOKENS = 77
EMPTY_LIST = ("extra_special_tokens", [])
SHARD_BYTES = 14_000_000  # no file of the model is larger


def build_transformer() -> FluxTransformer2DModel:
    """FLUX.1-dev's transformer, 9.3 million parameters: two double and four single blocks of width 256."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )


def build_autoencoder() -> AutoencoderKL:
    """FLUX.1's autoencoder (8x smaller each way, 16 latent channels), 2.4 million parameters."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 96, 96),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=PICTURE_SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def build_t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """The token-wise text encoder; its width is the transformer's joint attention width."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=32,
            num_heads=WIDTH // 32,
            d_ff=384,
            num_layers=2,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    )


def build_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The pooled text encoder."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=POOLED_WIDTH,
            intermediate_size=4 * POOLED_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=POOLED_WIDTH,
            max_position_embeddings=CLIP_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1-dev's schedule: sigmas shifted by an amount that depends on the number of picture tokens."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def load_tokenizers(folder: Path) -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """The two tokenizers of a model folder."""
    return CLIPTokenizer.from_pretrained(folder / "tokenizer"), T5TokenizerFast.from_pretrained(folder / "tokenizer_2")


def save_pipeline(
    folder: Path,
    transformer: FluxTransformer2DModel,
    autoencoder: AutoencoderKL,
    clip: CLIPTextModel,
    t5: T5EncoderModel,
) -> None:
    """Writes the standard diffusers folder in bf16, the transformer in shards; the tokenizers are there already."""
    tokenizer, tokenizer_2 = load_tokenizers(folder)
    pipeline = FluxPipeline(
        scheduler=build_scheduler(),
        vae=autoencoder.to(torch.bfloat16),
        text_encoder=clip.to(torch.bfloat16),
        tokenizer=tokenizer,
        text_encoder_2=t5.to(torch.bfloat16),
        tokenizer_2=tokenizer_2,
        transformer=transformer.to(torch.bfloat16),
    )
    pipeline.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    name_as_flux(folder)
    for config in folder.glob("*/*config.json"):
        drop_traces(config)


def drop_traces(config: Path) -> None:
    """Removes the folder that a part was loaded from, and an empty list that transformers before 5 cannot read."""
    settings = json.loads(config.read_text())
    kept = {key: value for key, value in settings.items() if key != "_name_or_path" and (key, value) != EMPTY_LIST}
    if kept != settings:
        config.write_text(json.dumps(kept, indent=2) + "\n")


def name_as_flux(folder: Path) -> None:
    """Puts back the names of FLUX.1's own files, which transformers 5 writes differently and version 4 needs."""
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"T5Tokenizer"', '"T5TokenizerFast"'))
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
