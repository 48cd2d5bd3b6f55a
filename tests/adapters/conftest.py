"""A tiny FLUX transformer, inputs for it, and random adapters."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxControlPipeline, FluxPipeline, FluxTransformer2DModel

from gossamer.adapters import Adapter, LowRankTerm
from gossamer.models.flux_spec import FluxSpec, linear_shapes, norm_shapes
from gossamer.models.swap import quantize

TINY = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 32,
    "num_attention_heads": 8,
    "joint_attention_dim": 256,
    "pooled_projection_dim": 256,
    "guidance_embeds": True,
    "axes_dims_rope": (8, 12, 12),
}


@pytest.fixture(autouse=True)
def _one_thread():
    """These products are too small to share out; waiting for a second thread would cost more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def spec():
    return FluxSpec.from_config(TINY)


@pytest.fixture
def make_model():
    """A tiny random model; always the same weights."""

    def make(**changes):
        torch.manual_seed(0)
        return FluxTransformer2DModel(**TINY | changes).eval().requires_grad_(False)

    return make


@pytest.fixture
def quantized(make_model):
    """The tiny model with its linears packed."""

    def make(storage="fp32", **changes):
        model = make_model(**changes)
        quantize(model, storage)
        return model

    return make


@pytest.fixture
def paint():
    """What a model makes of inputs that depend only on the number of channels."""

    @torch.inference_mode()
    def run(model, channels=64):
        generator = torch.Generator().manual_seed(1)

        def random(*shape):
            return torch.randn(*shape, generator=generator)

        side = torch.cartesian_prod(torch.tensor([0.0]), torch.arange(4.0), torch.arange(4.0))
        text, pooled, latents, picture = random(1, 6, 256), random(1, 256), random(1, 16, 64), random(1, 16, 64)
        return model(
            hidden_states=torch.cat([latents, picture], dim=-1)[..., :channels],
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=torch.tensor([0.5]),
            guidance=torch.tensor([3.5]),
            img_ids=side,
            txt_ids=torch.zeros(6, 3),
        ).sample

    return run


@pytest.fixture
def make_adapter(spec):
    """A random adapter: every linear that `wanted` accepts gets a term of its own rank and multiplier."""

    def make(
        wanted=lambda name: True, rank=4, multiplier=1.0, bias=False, norms=False, channels=None, seed=0, spec=spec
    ):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(*shape, generator=generator) * 0.1

        terms = {}
        for name, (out_features, in_features) in linear_shapes(spec).items():
            if wanted(name):
                inputs = channels if name == "x_embedder" and channels else in_features
                terms[name] = LowRankTerm(
                    random(rank, inputs), random(out_features, rank), multiplier, random(out_features) if bias else None
                )
        replacements = {name: 1 + random(*shape) for name, shape in norm_shapes(spec).items()} if norms else {}
        return Adapter(spec, terms, replacements)

    return make


@pytest.fixture
def control(make_adapter):
    """A Control LoRA: every linear with a bias, 128 input channels, all norm scales."""
    return make_adapter(bias=True, norms=True, channels=128, rank=3, seed=7)


@pytest.fixture
def pipeline():
    """A diffusers pipeline around a transformer, as much of it as its adapter loaders need."""

    def make(transformer, kind=FluxPipeline):
        parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        return kind(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **parts)

    return make


@pytest.fixture
def control_pipeline(pipeline):
    return lambda transformer: pipeline(transformer, FluxControlPipeline)
