"""The text-to-latent model under training: both text encoders and the transformer, and its flow-matching losses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from architecture import build_clip, build_t5, build_transformer, load_tokenizers

GRID = 16  # picture tokens along a side
UNGUIDED = 1.0
GUIDANCE_RANGE = (1.0, 7.0)
STRENGTH = 0.6  # classifier-free weight gained for each unit of guidance over 1


@dataclass(frozen=True)
class Text:
    """What the transformer reads of a prompt: tokens (B, T, 256) and a pooled vector (B, 128)."""

    tokens: Tensor
    pooled: Tensor


class Denoiser(nn.Module):
    """Both text encoders and the transformer."""

    def __init__(self, model_folder: Path) -> None:
        super().__init__()
        clip, t5 = load_tokenizers(model_folder)
        self.clip = build_clip(clip)
        self.t5 = build_t5(t5)
        self.transformer = build_transformer()
        initialize(self.transformer)
        side = torch.arange(GRID)
        rows, columns = torch.meshgrid(side, side, indexing="ij")
        ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
        self.register_buffer("picture_ids", ids.float(), persistent=False)

    def read(self, clip_ids: Tensor, t5_ids: Tensor) -> Text:
        """Encodes token ids as diffusers' FluxPipeline does (no attention mask)."""
        return Text(self.t5(t5_ids).last_hidden_state, self.clip(clip_ids).pooler_output)

    def velocity(
        self, noisy: Tensor, sigma: Tensor, text: Text, guidance: Tensor, transformer: nn.Module | None = None
    ) -> Tensor:
        """Predicted noise - latent, (B, 256, 64)."""
        text_ids = torch.zeros(text.tokens.shape[1], 3, device=noisy.device)
        run = self.transformer if transformer is None else transformer
        return run(
            hidden_states=noisy,
            encoder_hidden_states=text.tokens,
            pooled_projections=text.pooled,
            timestep=sigma,
            guidance=guidance,
            img_ids=self.picture_ids,
            txt_ids=text_ids,
            return_dict=False,
        )[0]


def initialize(transformer: nn.Module) -> None:
    """Xavier weights, zero modulation and output layers: a block starts as the identity (Peebles & Xie, 2022)."""
    for name, module in transformer.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
        if (
            name.endswith(("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear"))
            or name == "proj_out"
        ):
            nn.init.zeros_(module.weight)


def sample_sigma(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Noise levels: logit-normal around the inference schedule's middle; one in eight uniform, to see the ends."""
    normal = torch.sigmoid(0.3 + 1.1 * torch.randn(count, device=device, generator=generator))
    uniform = torch.rand(count, device=device, generator=generator)
    return torch.where(torch.rand(count, device=device, generator=generator) < 0.125, uniform, normal)


def mix(latents: Tensor, sigma: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy latents at `sigma`, and the velocity noise - latent."""
    noise = torch.randn(latents.shape, device=latents.device, generator=generator)
    level = sigma[:, None, None]
    return torch.lerp(latents, noise, level), noise - latents


def sample_guidance(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Uniform guidance values."""
    low, high = GUIDANCE_RANGE
    return low + (high - low) * torch.rand(count, device=device, generator=generator)


def guided(conditional: Tensor, unconditional: Tensor, guidance: Tensor) -> Tensor:
    """The guided velocity, classifier-free weight 1 + STRENGTH * (guidance - 1) (Ho & Salimans, 2022)."""
    extra = (STRENGTH * (guidance - 1.0))[:, None, None]
    return conditional + extra * (conditional - unconditional)
