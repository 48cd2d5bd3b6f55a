"""A small FLUX transformer as diffusers has it, with weights that let every part be seen in its output, and inputs."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel

SMALL = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "guidance_embeds": True,
    "axes_dims_rope": (8, 12, 12),
}


@pytest.fixture
def make_diffusers():
    """Always the same weights. Norm scales are not all one, and biases not near zero."""

    def make(**changes):
        torch.manual_seed(0)
        model = FluxTransformer2DModel(**SMALL | changes).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture
def make_inputs():
    """Inputs for a model of this config: two rows of latents more than columns, every token different."""

    def make(config, batch=1, dtype=torch.float32, text_tokens=5, side=4):
        generator = torch.Generator().manual_seed(1)

        def random(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        axes = [torch.zeros(1), torch.arange(side + 2.0), torch.arange(float(side))]
        guidance = torch.linspace(1.5, 3.5, batch) if config.guidance_embeds else None
        return {
            "hidden_states": random(batch, (side + 2) * side, config.in_channels),
            "encoder_hidden_states": random(batch, text_tokens, config.joint_attention_dim),
            "pooled_projections": random(batch, config.pooled_projection_dim),
            "timestep": torch.linspace(0.3, 0.7, batch).to(dtype),
            "guidance": guidance,
            "img_ids": torch.cartesian_prod(*axes),
            "txt_ids": torch.zeros(text_tokens, 3),
        }

    return make
