"""diffusers' FLUX pipelines, unchanged, on our transformer: the same latents as on diffusers' own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxControlNetModel

from gossamer.models.flux import from_diffusers

SIDE = 32  # pixels
LATENTS = 16  # channels of a packed latent token: 4, times 2 x 2


@dataclass(frozen=True)
class Case:
    """A pipeline, its transformer's input channels, and what it is called with; names in `pictures` get pictures."""

    pipeline: str
    in_channels: int = LATENTS
    pictures: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def with_controlnet(self):
        return "ControlNet" in self.pipeline


KONTEXT = {"max_area": SIDE * SIDE, "_auto_resize": False}
HALF = {"strength": 0.5}
CASES = {
    "text": Case("FluxPipeline"),
    "image to image": Case("FluxImg2ImgPipeline", pictures=("image",), options=HALF),
    "inpaint": Case("FluxInpaintPipeline", pictures=("image", "mask_image"), options=HALF),
    # latents, those of the masked picture, and a mask of 2 x 2 pixels per latent, 2 x 2 latents per token
    "fill": Case("FluxFillPipeline", 2 * LATENTS + 16, pictures=("image", "mask_image")),
    "control": Case("FluxControlPipeline", 2 * LATENTS, pictures=("control_image",)),
    "control, image to image": Case(
        "FluxControlImg2ImgPipeline", 2 * LATENTS, pictures=("image", "control_image"), options=HALF
    ),
    "control, inpaint": Case(
        "FluxControlInpaintPipeline", 2 * LATENTS, pictures=("image", "mask_image", "control_image"), options=HALF
    ),
    "kontext": Case("FluxKontextPipeline", pictures=("image",), options=KONTEXT),
    "kontext, inpaint": Case("FluxKontextInpaintPipeline", pictures=("image", "mask_image"), options=KONTEXT | HALF),
    "controlnet": Case("FluxControlNetPipeline", pictures=("control_image",)),
    "controlnet, image to image": Case(
        "FluxControlNetImg2ImgPipeline", pictures=("image", "control_image"), options=HALF
    ),
    "controlnet, inpaint": Case(
        "FluxControlNetInpaintPipeline", pictures=("image", "mask_image", "control_image"), options=HALF
    ),
}


@pytest.fixture(scope="module")
def parts():
    """Everything but the transformer; prompts are given as embeddings, so there are no text encoders."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    )
    missing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return {"vae": vae.eval(), "scheduler": FlowMatchEulerDiscreteScheduler(), **missing}


@pytest.fixture
def latents(parts):
    """What a pipeline makes of noise in two steps on a transformer."""

    def run(case, transformer, **options):
        extra = {"controlnet": controlnet(transformer.config)} if case.with_controlnet else {}
        pipeline = getattr(diffusers, case.pipeline)(**parts, **extra, transformer=transformer)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(5)
        pictures = {name: torch.rand(1, 3, SIDE, SIDE, generator=generator) for name in case.pictures}
        if "mask_image" in pictures:
            pictures["mask_image"] = (pictures["mask_image"][:, :1] > 0.5).float()
        return pipeline(
            prompt_embeds=torch.randn(1, 5, 24, generator=generator),
            pooled_prompt_embeds=torch.randn(1, 20, generator=generator),
            generator=generator,
            height=SIDE,
            width=SIDE,
            num_inference_steps=4 if "strength" in case.options else 2,
            output_type="latent",
            **pictures,
            **case.options,
            **options,
        ).images

    return run


def controlnet(config):
    """Fewer blocks than the transformer, and residuals that are not zero as those of an untrained one are."""
    torch.manual_seed(4)
    names = ("in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim")
    names += ("pooled_projection_dim", "guidance_embeds", "axes_dims_rope")
    model = FluxControlNetModel(num_layers=1, num_single_layers=2, **{name: config[name] for name in names}).eval()
    for parameter in model.requires_grad_(False).parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("guidance_embeds", [True, False], ids=["dev", "schnell"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_latents_equal_those_of_diffusers(make_diffusers, latents, case, guidance_embeds):
    theirs = make_diffusers(in_channels=case.in_channels, out_channels=LATENTS, guidance_embeds=guidance_embeds)
    expected = latents(case, theirs)
    assert expected.isfinite().all()
    got = latents(case, from_diffusers(theirs))
    assert ((got - expected).norm() / expected.norm()).item() <= 1e-5


def test_true_guidance_names_its_branches(make_diffusers, latents):
    theirs = make_diffusers()
    negative = {"negative_prompt_embeds": torch.ones(1, 5, 24), "negative_pooled_prompt_embeds": torch.ones(1, 20)}
    expected = latents(CASES["text"], theirs, true_cfg_scale=2.0, **negative)
    ours, branches = from_diffusers(theirs), []

    def noting(step, state):
        if step.index == 0:
            branches.append(state.branch)
        step(state)

    ours.runner = noting
    got = latents(CASES["text"], ours, true_cfg_scale=2.0, **negative)
    assert ((got - expected).norm() / expected.norm()).item() <= 1e-5
    assert branches == ["cond", "uncond"] * 2
