"""FLUX.1's transformer: the signature, config, names of weights and results of diffusers' FluxTransformer2DModel.

    tokens       = [context_embedder(text), x_embedder(image)]          (batch, text + image tokens, width)
    conditioning = timestep, guidance and pooled prompt                 (batch, width)
    vectors      = every block's modulation of the conditioning
    tokens       through all blocks (see `seam`)
    sample       = proj_out(norm(image tokens))                         (batch, image tokens, patch^2 * out_channels)

diffusers' pipelines run on it unchanged. What it leaves out is refused, not ignored: IP adapters, and diffusers' own
step caches and offloading by groups, whose place is the seam. It does not train.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin  # type: ignore[attr-defined]
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.nn import functional as F

from gossamer.errors import InvalidOptionError
from gossamer.models.flux.blocks import DoubleBlock, SingleBlock
from gossamer.models.flux.embeddings import Conditioning
from gossamer.models.flux.lora_scale import lora_scale
from gossamer.models.flux.modulation import AdaLN, Conditions, ModelVectors, Modulator, modulate, out_vectors
from gossamer.models.flux.operators import Operators
from gossamer.models.flux.rehearsal import Rehearsal, unrehearsed
from gossamer.models.flux.residuals import repeat, spread
from gossamer.models.flux.rope import rotation
from gossamer.models.flux.seam import (
    BlockRunner,
    BlockState,
    BlockStep,
    BlockWeights,
    Resident,
    Shared,
    run_block,
    run_blocks,
)
from gossamer.models.flux.step import StepInputs, Stepper, in_turn, run_step

Residuals = Sequence[torch.Tensor] | None


class FluxTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """A drop-in for `diffusers.FluxTransformer2DModel`.

    `runner`, `weights`, `stepper`, `operators`, `modulator` and `rehearsal` may be set.
    """

    _no_split_modules: Any = ["DoubleBlock", "SingleBlock"]  # noqa: RUF012 - declared without ClassVar by diffusers
    _repeated_blocks: Any = ["DoubleBlock", "SingleBlock"]  # noqa: RUF012
    _skip_layerwise_casting_patterns: Any = ("norm",)
    # offloading by groups would miss the modulation, which reads the linears of every block before the first block
    _supports_group_offloading = False

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, ...] = (16, 56, 56),
    ) -> None:
        super().__init__()
        heads, head_size = num_attention_heads, attention_head_dim
        width = heads * head_size
        self.time_text_embed = Conditioning(pooled_projection_dim, width, guidance_embeds)
        self.context_embedder = nn.Linear(joint_attention_dim, width)
        self.x_embedder = nn.Linear(in_channels, width)
        self.transformer_blocks = nn.ModuleList([DoubleBlock(heads, head_size) for _ in range(num_layers)])
        singles = [SingleBlock(heads, head_size) for _ in range(num_single_layers)]
        self.single_transformer_blocks = nn.ModuleList(singles)
        self.norm_out = AdaLN(width, 2)
        self.proj_out = nn.Linear(width, patch_size**2 * (out_channels or in_channels))
        self.runner: BlockRunner = run_block
        self.stepper: Stepper = run_step
        self.weights: BlockWeights = Resident()
        self.operators = Operators()
        self.modulator: Modulator = modulate
        self.rehearsal: Rehearsal = unrehearsed
        self._axes = tuple(axes_dims_rope)
        self._branch: str | None = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
        img_ids: torch.Tensor,
        txt_ids: torch.Tensor,
        guidance: torch.Tensor | None = None,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        controlnet_block_samples: Residuals = None,
        controlnet_single_block_samples: Residuals = None,
        return_dict: bool = True,
        controlnet_blocks_repeat: bool = False,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """The velocity that the model predicts for packed latents.

        `hidden_states` (batch, image tokens, in_channels), `encoder_hidden_states` (batch, text tokens,
        joint_attention_dim), `pooled_projections` (batch, pooled_projection_dim), `timestep` and `guidance` (batch,)
        with a timestep from 0 to 1, `img_ids` and `txt_ids` (tokens, axes). ControlNet samples are
        (batch, image tokens, width) each. `joint_attention_kwargs` may hold `scale`, the strength of PEFT adapters.
        """
        with lora_scale(self, joint_attention_kwargs or {}), in_turn(self.stepper):
            given = Conditions(timestep, guidance, pooled_projections, hidden_states.dtype, self._branch)
            vectors = self.modulator(self, given)
            turned = rotation(txt_ids, img_ids, self._axes)
            arrange = repeat if controlnet_blocks_repeat else spread
            residuals = [
                *arrange(controlnet_block_samples, len(self.transformer_blocks)),
                *spread(controlnet_single_block_samples, len(self.single_transformer_blocks)),
            ]
            inputs = StepInputs(hidden_states, encoder_hidden_states, vectors, turned, residuals, self._branch)
            sample = self.stepper(self, inputs)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def run(self, inputs: StepInputs) -> torch.Tensor:
        """Embedding, all blocks, and the projection behind them: what `stepper` runs, or repeats."""
        self.rehearsal(self, inputs)
        vectors, shared = inputs.vectors, Shared(inputs.rotation, self.operators)
        state = self._embed(inputs.image, inputs.text, inputs.branch)
        run_blocks(self._steps(vectors, shared, inputs.residuals), state, self.runner)
        rows = self.operators.pointwise.norm_modulate(state.image, vectors.out, state.dtype)
        sample: torch.Tensor = self.proj_out(rows.values)
        return sample

    # what is known before the first block -----------------------------------------------------------------------------

    def condition(self, given: Conditions) -> torch.Tensor:
        """The conditioning (batch, width) of one step, or of several as one batch."""
        guidance = None if given.guidance is None else given.guidance.to(given.dtype) * 1000
        timestep = given.timestep.to(given.dtype) * 1000
        conditioning: torch.Tensor = self.time_text_embed(timestep, guidance, given.pooled)
        return conditioning

    def modulation(self, conditioning: torch.Tensor) -> ModelVectors:
        """Every block's vectors from the conditioning (batch, width) of one step, or of several as one batch."""
        activated = F.silu(conditioning)
        return ModelVectors(
            tuple(block.vectors(activated) for block in self.transformer_blocks),  # type: ignore[operator]
            tuple(block.vectors(activated) for block in self.single_transformer_blocks),  # type: ignore[operator]
            out_vectors(self.norm_out, activated),
        )

    def _embed(self, image: torch.Tensor, text: torch.Tensor, branch: str | None) -> BlockState:
        tokens = torch.cat((self.context_embedder(text), self.x_embedder(image)), dim=1)
        return BlockState(tokens, text.shape[1], branch)

    def _steps(
        self, vectors: ModelVectors, shared: Shared, residuals: Sequence[torch.Tensor | None]
    ) -> Iterator[BlockStep]:
        double, single = list(self.transformer_blocks), list(self.single_transformer_blocks)
        count, weights = len(residuals), self.weights
        for index, block in enumerate(double):
            yield BlockStep(index, count, "double", block, vectors.double[index], shared, weights, residuals[index])
        for place, block in enumerate(single):
            index = len(double) + place
            yield BlockStep(index, count, "single", block, vectors.single[place], shared, weights, residuals[index])

    # what diffusers' pipelines call besides ---------------------------------------------------------------------------

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Pipelines name the branch of the guidance here, "cond" or "uncond"; the runner finds it in the state."""
        before, self._branch = self._branch, name
        try:
            yield
        finally:
            self._branch = before

    def enable_cache(self, config: object) -> None:
        """diffusers' own step caches patch block forwards that this model does not have."""
        raise InvalidOptionError(
            f"A {type(config).__name__} cannot be enabled on this transformer.",
            "diffusers' step caches replace the forwards of its own blocks.",
            "Set a runner on the model instead, see gossamer.models.flux.seam.",
        )
