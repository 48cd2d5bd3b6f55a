"""The modulation pre-pass: what pipelines get is what they get without it, from one look at the weights a run."""

from __future__ import annotations

import contextlib

import diffusers
import pytest
import torch

from gossamer.adapters import Adapter, LowRankTerm, attach, attached, set_scale
from gossamer.models.flux import from_diffusers, prepass
from gossamer.models.flux.modulation import AdaLN
from gossamer.models.flux.prepass import unchanging
from gossamer.models.flux_spec import FluxSpec, linear_shapes
from gossamer.models.swap import quantize

STEPS = 4


@pytest.fixture
def painting():
    """Latents that a pipeline's loop makes with our transformer; no text encoders or autoencoder are needed."""

    def paint(model, with_prepass, batch=1, guidance=3.5, seed=0, on_step=None, negative=False, at_step=unchanging):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        pipe = diffusers.FluxPipeline(scheduler, None, None, None, None, None, model)
        pipe.set_progress_bar_config(disable=True)
        config, generator = model.config, torch.Generator().manual_seed(seed)

        def text(seed):
            own = torch.Generator().manual_seed(seed)
            embeds = torch.randn(batch, 5, config.joint_attention_dim, generator=own)
            return embeds, torch.randn(batch, config.pooled_projection_dim, generator=own)

        prompt, pooled = text(1)
        extra = {}
        if negative:
            extra["negative_prompt_embeds"], extra["negative_pooled_prompt_embeds"] = text(2)
            extra["true_cfg_scale"] = 2.0
        options = {"height": 64, "width": 64, "num_inference_steps": STEPS, "guidance_scale": guidance, **extra}
        scope = prepass(model, scheduler, at_step) if with_prepass else contextlib.nullcontext()
        with scope:
            return pipe(
                prompt_embeds=prompt,
                pooled_prompt_embeds=pooled,
                generator=generator,
                output_type="latent",
                callback_on_step_end=on_step,
                **options,
            ).images

    return paint


def counted(model):
    """How often each modulation linear runs."""
    calls = []
    for part in model.modules():
        if isinstance(part, AdaLN):
            part.linear.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("guidance_embeds", [True, False])
def test_a_run_is_the_same(make_diffusers, painting, batch, negative, guidance_embeds):
    model = from_diffusers(make_diffusers(guidance_embeds=guidance_embeds))
    options = {"batch": batch, "negative": negative}
    expected = painting(model, False, **options)
    torch.testing.assert_close(painting(model, True, **options), expected, rtol=1e-4, atol=1e-5)


def test_the_weights_are_read_once_a_run(make_diffusers, painting):
    model = from_diffusers(make_diffusers())
    calls = counted(model)
    painting(model, True)
    norms = len(calls)
    assert norms == 2 * 2 + 3 + 1
    painting(model, True, negative=True)
    assert len(calls) == 3 * norms
    painting(model, False)
    assert len(calls) == (3 + STEPS) * norms


def test_every_run_is_computed_anew(make_diffusers, painting):
    model = from_diffusers(make_diffusers())
    with_other_guidance = painting(model, False, guidance=1.5)
    painting(model, True, guidance=3.5)
    torch.testing.assert_close(painting(model, True, guidance=1.5), with_other_guidance, rtol=1e-4, atol=1e-5)


@pytest.fixture
def adapted(make_diffusers):
    """The model with an adapter, by default on its modulation linears."""

    def make(part=".norm"):
        model = from_diffusers(make_diffusers())
        quantize(model, "fp32")
        torch.manual_seed(4)
        spec = FluxSpec.from_config(model.config)
        shapes = {name: shape for name, shape in linear_shapes(spec).items() if part in name}
        terms = {
            name: LowRankTerm(torch.randn(2, columns) * 0.2, torch.randn(rows, 2) * 0.2)
            for name, (rows, columns) in shapes.items()
        }
        attach(model, Adapter(spec, terms), "style")
        return model

    return make


def test_a_scale_that_changes_between_steps_is_seen(adapted, painting):
    """Adapters on modulation linears belong to the pre-pass."""

    def fading(model):
        def on_step(pipe, step, timestep, tensors):
            set_scale(model, "style", 1.0 - (step + 1) / STEPS)
            return {}

        return on_step

    plain, quick = adapted(), adapted()
    expected = painting(plain, False, on_step=fading(plain))
    found = painting(quick, True, on_step=fading(quick))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    constant = adapted()
    assert not torch.allclose(painting(constant, True), expected, atol=1e-2)


FACTORS = (0.0, 1.0, 1.0, 0.25)  # in each of the steps


def following(model):
    """What gives the adapter its strength in a step, and calls that before each step of a pipeline."""

    def at_step(step):
        if attached(model)["style"].scale != FACTORS[step]:
            set_scale(model, "style", FACTORS[step])

    def on_step(pipe, step, timestep, tensors):
        if step + 1 < STEPS:
            at_step(step + 1)
        return {}

    at_step(0)
    return {"at_step": at_step, "on_step": on_step}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("negative", [False, True])
def test_strengths_that_follow_the_steps(adapted, painting, batch, negative):
    plain, quick = adapted(), adapted()
    options = {"batch": batch, "negative": negative}
    expected = painting(plain, False, **options, on_step=following(plain)["on_step"])
    calls = counted(quick)
    found = painting(quick, True, **options, **following(quick))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    norms = 2 * 2 + 3 + 1
    assert len(calls) == len(set(FACTORS)) * norms * (2 if negative else 1), "one pass for all steps of one strength"
    assert attached(quick)["style"].scale == FACTORS[-1], "as the last step has it"


def test_adapters_elsewhere_need_one_pass(adapted, painting):
    plain, quick = adapted("attn"), adapted("attn")
    expected = painting(plain, False, on_step=following(plain)["on_step"])
    calls = counted(quick)
    torch.testing.assert_close(painting(quick, True, **following(quick)), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2 * 2 + 3 + 1


def test_an_error_in_the_pre_pass_leaves_the_strengths_of_the_step(adapted, painting, monkeypatch):
    model = adapted()
    follow = following(model)
    monkeypatch.setattr(model, "condition", lambda given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        painting(model, True, **follow)
    assert attached(model)["style"].scale == FACTORS[0]


def test_the_modulator_is_put_back_after_an_error(make_diffusers, painting):
    model = from_diffusers(make_diffusers())
    before = model.modulator

    def fail(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        painting(model, True, on_step=fail)
    assert model.modulator is before
