"""What a step is conditioned on besides the text tokens: timestep, guidance and the pooled prompt, as one vector.

    conditioning = mlp(sinusoids(timestep)) + mlp(sinusoids(guidance)) + mlp(pooled)      (batch, width)
    mlp          = linear, SiLU, linear
    sinusoids(t) = [cos(t f_i), sin(t f_i)],  f_i = 10000^(-i / 128),  i = 0 ... 127       float32

Timestep and guidance come times 1000. schnell has no guidance term.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from gossamer.errors import InvalidOptionError
from gossamer.models.flux_spec import TIMESTEP_CHANNELS

LONGEST_PERIOD = 10000.0


def sinusoids(values: torch.Tensor) -> torch.Tensor:
    """(batch,) to (batch, 256) in float32, cosines first."""
    half = TIMESTEP_CHANNELS // 2
    steps = torch.arange(half, dtype=torch.float32, device=values.device)
    angles = values[:, None].float() * torch.exp(-math.log(LONGEST_PERIOD) * steps / half)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class Embedder(nn.Module):
    """Two linears with SiLU between them."""

    def __init__(self, in_features: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, in_features) to (batch, width)."""
        embedded: torch.Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return embedded


class Conditioning(nn.Module):
    """The conditioning vector; `guidance_embeds` as in the model's config."""

    def __init__(self, pooled_features: int, width: int, guidance_embeds: bool) -> None:
        super().__init__()
        self.timestep_embedder = Embedder(TIMESTEP_CHANNELS, width)
        if guidance_embeds:
            self.guidance_embedder = Embedder(TIMESTEP_CHANNELS, width)
        self.text_embedder = Embedder(pooled_features, width)

    def forward(self, timestep: torch.Tensor, guidance: torch.Tensor | None, pooled: torch.Tensor) -> torch.Tensor:
        """Timestep and guidance (batch,), times 1000, and pooled (batch, pooled_features) to (batch, width)."""
        self._require_guidance(guidance is not None)
        conditioning: torch.Tensor = self.timestep_embedder(sinusoids(timestep).to(pooled.dtype))
        if guidance is not None:
            conditioning = conditioning + self.guidance_embedder(sinusoids(guidance).to(pooled.dtype))
        conditioning = conditioning + self.text_embedder(pooled)
        return conditioning

    def _require_guidance(self, given: bool) -> None:
        wanted = "guidance_embedder" in self._modules
        if given != wanted:
            raise InvalidOptionError(
                "The model needs a guidance value." if wanted else "The model takes no guidance value.",
                "Its config says guidance_embeds=" + ("True, as FLUX.1-dev's." if wanted else "False, as schnell's."),
                "Give `guidance`, one value per picture." if wanted else "Leave `guidance` out.",
            )
