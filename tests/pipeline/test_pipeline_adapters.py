"""Adapters of a pipeline over time: windows of a run, whole sets exchanged, fused and taken out again."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from PIL import Image

import gossamer
from gossamer import adapters
from gossamer.adapters import Adapter, LowRankTerm, write_adapter
from gossamer.demo.embedded import model_folder
from gossamer.errors import AdapterError, FileMissingError, InvalidOptionError, NotReproducibleError, WrongModelError
from gossamer.models.flux_spec import linear_shapes
from gossamer.pipeline import adapter_set
from gossamer.pipeline.loras import LoraChoice
from gossamer.pipeline.options import PaintOptions
from gossamer.pipeline.picture import read_picture, save
from gossamer.pipeline.schedule import Schedule

pytestmark = pytest.mark.usefixtures("one_thread", "bundled")

PROMPT = "a red sphere on top of a blue cube"
STEPS = 4
QUICK = {"steps": STEPS, "size": (64, 64)}


def pixels(image):
    return np.asarray(image).astype(np.int16)


def stored_bytes(pipe):
    parts = (pipe.transformer, pipe.components["text_encoder"], pipe.components["text_encoder_2"])
    state = {(place, name): tensor for place, part in enumerate(parts) for name, tensor in part.state_dict().items()}
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in state.items()}


def terms_of(pipe):
    return [term for layer in gossamer.linear_layers(pipe.transformer).values() for term in layer.adapters()]


@pytest.fixture(autouse=True)
def bare(request):
    """The shared pipeline has nothing attached when a test is over."""
    yield
    if "pipe" in request.fixturenames:
        pipe = request.getfixturevalue("pipe")
        if pipe.fused:
            pipe.unfuse()
        for name in pipe.adapters:
            pipe.detach(name)


def random_adapter(spec, ends, seed, **parts):
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: shape for name, shape in linear_shapes(spec).items() if name.endswith(ends)}

    def random(*shape):
        return torch.randn(*shape, generator=generator) * 0.15

    terms = {name: LowRankTerm(random(4, columns), random(rows, 4)) for name, (rows, columns) in shapes.items()}
    return Adapter(spec, terms, **parts)


@pytest.fixture(scope="module")
def ink(embedded_spec, tmp_path_factory):
    """An adapter that changes modulation linears too."""
    path = tmp_path_factory.mktemp("ink") / "ink.safetensors"
    write_adapter(
        random_adapter(embedded_spec, ("attn.to_q", "norm1.linear", "norm.linear", "norm_out.linear"), 5), path
    )
    return str(path)


@pytest.fixture(scope="module")
def text_style(embedded_spec, tmp_path_factory):
    """An adapter for the transformer and for both text encoders of the embedded model."""
    pipe = FluxPipeline.from_pretrained(model_folder())
    text = {}
    generator = torch.Generator().manual_seed(6)
    for component, name in (
        ("text_encoder", "encoder.layers.0.mlp.fc1"),
        ("text_encoder_2", "encoder.block.0.layer.0.SelfAttention.v"),
    ):
        modules = dict(getattr(pipe, component).named_modules())
        linear = modules.get(name) or modules["text_model." + name]
        down = torch.randn(2, linear.in_features, generator=generator) * 0.5
        up = torch.randn(linear.out_features, 2, generator=generator) * 0.5
        text[component] = {("text_model." if component == "text_encoder" else "") + name: LowRankTerm(down, up)}
    path = tmp_path_factory.mktemp("text") / "words.safetensors"
    write_adapter(random_adapter(embedded_spec, "attn.to_q", 7, text=text), path)
    return str(path)


# windows --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(pipe, name, strengths, seed=0):
    """The denoise loop written out, with the strength of one adapter set by hand before each step."""
    flux, scheduler = FluxPipeline(**pipe.components), pipe.components["scheduler"]
    steps, config = len(strengths), scheduler.config
    embeds, pooled, text_ids = flux.encode_prompt(PROMPT, None, max_sequence_length=64)
    noise = torch.Generator().manual_seed(seed)
    latents, image_ids = flux.prepare_latents(1, 16, 64, 64, embeds.dtype, embeds.device, noise)
    sizes = [config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift]
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(latents.shape[1], *sizes))
    encoders = {component: pipe.components[component] for component in ("text_encoder", "text_encoder_2")}
    before = pipe.adapters[name]
    for strength, timestep in zip(strengths, scheduler.timesteps, strict=True):
        adapters.set_scale(pipe.transformer, name, strength, encoders)
        velocity = pipe.transformer(
            hidden_states=latents,
            timestep=timestep.expand(1) / 1000,
            guidance=torch.tensor([3.5]),
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=text_ids,
            img_ids=image_ids,
        ).sample
        latents = scheduler.step(velocity, timestep, latents).prev_sample
    adapters.set_scale(pipe.transformer, name, before, encoders)
    latents = flux._unpack_latents(latents, 64, 64, flux.vae_scale_factor)
    decoded = flux.vae.decode(latents / flux.vae.config.scaling_factor + flux.vae.config.shift_factor).sample
    return pixels(flux.image_processor.postprocess(decoded)[0])


@pytest.mark.parametrize(
    ("start", "end", "active"), [(0, 1, "1111"), (0.25, 0.75, "0110"), (0.3, 1, "0011"), (0, 0.1, "1000")]
)
def test_a_window_is_what_a_loop_by_hand_does(pipe, ink, start, end, active):
    name = pipe.attach(ink, scale=0.8, start=start, end=end)
    found = pixels(pipe(PROMPT, **QUICK))
    expected = by_hand(pipe, name, [0.8 * int(digit) for digit in active])
    assert np.abs(found - expected).max() <= 1
    assert pipe.adapters == {"ink": 0.8}
    assert adapters.attached(pipe.transformer)["ink"].scale == 0.8


def test_windows_change_the_picture(pipe, ink):
    pipe.attach(ink)
    painted = []
    for window in ((0, 1), (0, 0.5), (0.5, 1)):
        pipe.set_schedule("ink", *window)
        painted.append(pixels(pipe(PROMPT, **QUICK)))
    pipe.detach("ink")
    painted.append(pixels(pipe(PROMPT, **QUICK)))
    for place, one in enumerate(painted):
        for other in painted[:place]:
            assert np.abs(one - other).max() > 4


def test_text_encoders_read_the_prompt_at_the_adapter_s_scale(pipe, text_style):
    """The prompt is read once, before the first step, so the window has no say in it."""
    name = pipe.attach(text_style, 0.5, start=0.5)
    found = pixels(pipe(PROMPT, **QUICK))
    assert np.abs(found - by_hand(pipe, name, [0, 0, 0.5, 0.5])).max() <= 1


def test_two_windows_that_meet(pipe, ink, bundled):
    pipe.attach(ink, end=0.5)
    pipe.attach("pencil:0.5@0.5-1")
    assert pipe.schedules == {"ink": Schedule(0, 0.5), "pencil": Schedule(0.5, 1)}
    pipe.set_scale("pencil", 0.7)
    assert pipe.schedules["pencil"] == Schedule(0.5, 1), "another scale leaves the window"
    both = pixels(pipe(PROMPT, **QUICK))
    pipe.swap({"pencil": 0.7})
    assert pipe.schedules == {}
    assert np.abs(pixels(pipe(PROMPT, **QUICK)) - both).max() > 4


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 2])
def test_an_end_in_the_middle_of_a_run(pipe, ink, error, at):
    pipe.attach(ink, 0.8, 0.25, 0.75)
    options = PaintOptions(PROMPT, **QUICK)
    before = pipe.paint(options).pixels_sha256

    def stop(done, total):
        if done == at:
            raise error

    with pytest.raises(error):
        pipe.paint(options, stop)
    assert adapters.attached(pipe.transformer)["ink"].scale == 0.8
    assert {term.scale for term in terms_of(pipe)} == {0.8}
    assert pipe.paint(options).pixels_sha256 == before


def test_a_window_without_steps(pipe, ink):
    pipe.attach(ink, start=0.3, end=0.45)
    with pytest.raises(InvalidOptionError, match="'ink' would act in no step") as caught:
        pipe(PROMPT, **QUICK)
    assert "0.3 <= i/4 < 0.45" in caught.value.why
    assert pipe(PROMPT, steps=5, size=(64, 64))
    with pytest.raises(InvalidOptionError, match="no part of a run"):
        pipe.set_schedule("ink", 0.5, 0.2)


def test_the_window_is_in_the_picture_and_a_rerun_follows_it(pipe, ink, tmp_path):
    pipe.attach(f"{ink}:0.8@0.25-0.75")
    painting = pipe.paint(PaintOptions(PROMPT, **QUICK))
    (use,) = painting.recipe.adapters
    assert (use.scale, use.start, use.end, use.fused) == (0.8, 0.25, 0.75, False)
    assert 'Lora windows: "ink: 0.25-0.75"' in painting.image.info["parameters"]
    result = gossamer.rerun(save(painting.image, tmp_path / "x.png"))
    assert result.identical
    assert result.painting.recipe == painting.recipe


def test_pictures_from_before_windows_still_rerun(pipe, bundled, tmp_path):
    pipe.attach("pencil:0.7")
    image = pipe(PROMPT, **QUICK)
    record = json.loads(image.info["gossamer"])
    for use in record["recipe"]["adapters"]:
        for name in ("start", "end", "fused"):
            del use[name]
    image.info["gossamer"] = json.dumps(record)
    file = save(image, tmp_path / "old.png")
    assert read_picture(file).recipe.adapters[0].end == 1
    assert gossamer.rerun(file).identical


# whole sets -----------------------------------------------------------------------------------------------------------


def test_swap_changes_the_whole_set(pipe, ink, bundled, monkeypatch):
    pipe.attach("pencil:0.5")
    pipe.swap([f"{ink}:0.6@0-0.5", "pencil:0.25"])
    assert pipe.adapters == {"pencil": 0.25, "ink": 0.6}, "what stays keeps its place"
    assert list(adapters.attached(pipe.transformer)) == ["pencil", "ink"]
    assert pipe.schedules == {"ink": Schedule(0, 0.5)}
    read = []
    monkeypatch.setattr(adapter_set, "read_adapters", lambda choices, spec, device: read.extend(choices) or ())
    terms = terms_of(pipe)
    pipe.swap({"ink": 0.9, "pencil": 0.1})
    assert pipe.adapters == {"pencil": 0.1, "ink": 0.9}
    pipe.swap([LoraChoice(ink, 0.3), "pencil"])
    assert read == [], "by name and by source"
    assert all(one is other for one, other in zip(terms, terms_of(pipe), strict=True))
    pipe.swap([])
    assert pipe.adapters == {}
    assert not adapters.attached(pipe.transformer)


def test_swap_is_attaching_in_that_order(pipe, ink, bundled):
    pipe.attach("pencil:0.5")
    pipe.swap({ink: 0.6})
    swapped = pipe.paint(PaintOptions(PROMPT, **QUICK))
    assert [use.source for use in swapped.recipe.adapters] == [ink]
    pipe.detach("ink")
    pipe.attach(ink, 0.6)
    assert pipe.paint(PaintOptions(PROMPT, **QUICK)).pixels_sha256 == swapped.pixels_sha256


@pytest.mark.parametrize(
    ("loras", "error"),
    [
        (["ink", "no.safetensors"], FileMissingError),
        (["pencil", "edges", "edges:0.5"], AdapterError),
        (["pencil", "pencil:0.5"], AdapterError),
        ({"pencil": 0.5, "COPY": 1.0}, AdapterError),
        ({"pencil": float("nan")}, InvalidOptionError),
        ({"ink": 1.0, "pencil": 1e39}, AdapterError),
        (["edges", "pencil:1e39"], AdapterError),
        (["edges", "COPY:1e39"], AdapterError),
        (["BIG"], WrongModelError),
        ("pencil", InvalidOptionError),
    ],
)
def test_a_swap_that_fails_leaves_the_set(pipe, ink, bundled, tmp_path, loras, error):
    copied = tmp_path / "copied.safetensors"
    copied.write_bytes(bundled["pencil"].read_bytes())
    wide = tmp_path / "wide.safetensors"
    spec = pipe._adapters.spec
    write_adapter(random_adapter(replace(spec, num_attention_heads=spec.num_attention_heads * 2), "attn.to_q", 1), wide)
    files = {"COPY": str(copied), "BIG": str(wide)}
    if isinstance(loras, dict):
        loras = {files.get(name, name): scale for name, scale in loras.items()}
    elif isinstance(loras, list):
        loras = [name.replace("COPY", files["COPY"]).replace("BIG", files["BIG"]) for name in loras]
    pipe.attach(ink, 0.6, end=0.5)
    pipe.attach("pencil:0.5")
    before, state = pipe.paint(PaintOptions(PROMPT, **QUICK)), stored_bytes(pipe)
    with pytest.raises(error):
        pipe.swap(loras)
    assert pipe.adapters == {"ink": 0.6, "pencil": 0.5}
    assert pipe.schedules == {"ink": Schedule(0, 0.5)}
    assert stored_bytes(pipe) == state
    again = pipe.paint(PaintOptions(PROMPT, **QUICK))
    assert again.recipe == before.recipe
    assert again.pixels_sha256 == before.pixels_sha256


def test_one_control_lora_for_another(pipe, embedded_spec, tmp_path):
    """Both replace the same norms, so one has to go before the other comes."""
    files = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        wide = LowRankTerm(
            torch.randn(2, 2 * embedded_spec.in_channels, generator=generator),
            torch.randn(embedded_spec.width, 2, generator=generator),
        )
        norm = {
            "transformer_blocks.0.attn.norm_q.weight": torch.rand(embedded_spec.attention_head_dim, generator=generator)
        }
        files.append(tmp_path / f"control-{seed}.safetensors")
        write_adapter(Adapter(embedded_spec, {"x_embedder": wide}, norm), files[-1], "bfl")
    before = stored_bytes(pipe)
    pipe.attach(str(files[0]))
    pipe.swap({str(files[1]): 0.5})
    assert pipe.adapters == {"control-2": 0.5}
    pipe.swap([])
    assert stored_bytes(pipe) == before
    assert pipe.transformer.config.in_channels == embedded_spec.in_channels


# fused ----------------------------------------------------------------------------------------------------------------


def test_a_fused_pipeline_paints_what_an_attached_one_does(ink, text_style, bundled):
    pipe = gossamer.load(storage="fp32", text_storage="fp32", loras=[f"{ink}:0.8", text_style, "pencil:0.5"])
    before = stored_bytes(pipe)
    attached = pipe.paint(PaintOptions(PROMPT, **QUICK))
    report = pipe.fuse(["ink", "words"])
    assert report.fidelity == 1
    assert {place.split(".")[0] for place in report.layers} > {"text_encoder", "text_encoder_2"}
    assert pipe.adapters == {"pencil": 0.5}
    assert pipe.fused == {"ink": 0.8, "words": 1.0}
    fused = pipe.paint(PaintOptions(PROMPT, **QUICK))
    assert np.abs(pixels(fused.image) - pixels(attached.image)).max() <= 1
    assert [(use.name, use.fused) for use in fused.recipe.adapters] == [
        ("ink", True),
        ("words", True),
        ("pencil", False),
    ]
    assert not fused.recipe.same_pixels(attached.recipe)
    assert pipe.unfuse() == ("ink", "words")
    assert stored_bytes(pipe) == before
    assert pipe.adapters == {"pencil": 0.5, "ink": 0.8, "words": 1.0}
    assert pipe.fused == {}


@pytest.mark.filterwarnings("ignore:Fused into")
def test_a_fused_picture_reruns(ink, bundled, tmp_path):
    pipe = gossamer.load(storage="Q4_K", loras=["pencil:0.5", f"{ink}:0.8"])
    pipe.fuse(["ink"])
    painting = pipe.paint(PaintOptions(PROMPT, **QUICK))
    assert [(use.name, use.fused) for use in painting.recipe.adapters] == [("ink", True), ("pencil", False)]
    file = save(painting.image, tmp_path / "x.png")
    result = gossamer.rerun(file)
    assert result.identical
    assert result.painting.recipe == painting.recipe
    pipe.unfuse()
    assert pipe.paint(PaintOptions(PROMPT, **QUICK)).pixels_sha256 != painting.pixels_sha256
    record = json.loads(painting.image.info["gossamer"])
    record["recipe"]["adapters"][0]["sha256"] = "0" * 64
    painting.image.info["gossamer"] = json.dumps(record)
    with pytest.raises(NotReproducibleError, match="ink"):
        gossamer.rerun(save(painting.image, tmp_path / "y.png"))


@pytest.mark.filterwarnings("ignore:Fused into")
def test_what_is_fused_has_no_strength_of_its_own(pipe, ink, bundled):
    pipe.attach(ink, end=0.5)
    with pytest.raises(InvalidOptionError, match=r"cannot be fused: it acts in a part of a run, 0-0\.5"):
        pipe.fuse()
    pipe.set_schedule("ink")
    before = stored_bytes(pipe)
    pipe.fuse()
    for call in (
        lambda: pipe.set_scale("ink", 0.5),
        lambda: pipe.detach("ink"),
        lambda: pipe.set_schedule("ink", 0, 0.5),
    ):
        with pytest.raises(AdapterError, match="'ink' is fused") as caught:
            call()
        assert caught.value.next_step == "Call unfuse() first."
    with pytest.raises(AdapterError, match="attached already, as 'ink'"):
        pipe.attach(ink)
    with pytest.raises(AdapterError, match="attached already, as 'ink'"):
        pipe.swap([ink])
    pipe.swap(["pencil"])
    assert (pipe.adapters, pipe.fused) == ({"pencil": 1.0}, {"ink": 1.0})
    with pytest.raises(AdapterError, match="is fused into this model already"):
        pipe.fuse()
    pipe.unfuse()
    assert stored_bytes(pipe) == before
    with pytest.raises(AdapterError, match="nothing to fuse"):
        pipe.fuse([])


@pytest.mark.filterwarnings("ignore:Fused into")
def test_a_fused_control_lora_still_needs_its_picture(pipe, bundled):
    pipe.attach("edges")
    pipe.fuse()
    with pytest.raises(InvalidOptionError, match="control picture is needed"):
        pipe(PROMPT, **QUICK)
    assert pipe(PROMPT, control=Image.new("RGB", (64, 64)), **QUICK)


def test_fusing_behind_the_pipeline_s_back(pipe, ink, bundled):
    pipe.attach("edges")
    pipe.fuse()
    adapters.unfuse(pipe.transformer)
    with pytest.raises(AdapterError, match="behind the pipeline"):
        pipe(PROMPT, **QUICK)
    adapters.detach(pipe.transformer, "edges")
    pipe._adapters._fused.clear()


# an existing pipeline -------------------------------------------------------------------------------------------------


def test_optimize_takes_adapters_for_text_encoders(text_style):
    pipe = FluxPipeline.from_pretrained(model_folder(), torch_dtype=torch.float32)
    taken = gossamer.optimize(pipe, storage="fp32")
    before = stored_bytes(taken)
    plain = pixels(taken(PROMPT, **QUICK))
    taken.attach(text_style, 0.5)
    found = pixels(taken(PROMPT, **QUICK))
    loaded = gossamer.load(storage="fp32", text_storage="fp32", loras=[f"{text_style}:0.5"])
    assert (found == pixels(loaded(PROMPT, **QUICK))).all()
    assert np.abs(found - plain).max() > 4
    taken.detach("words")
    assert stored_bytes(taken) == before
    assert (pixels(taken(PROMPT, **QUICK)) == plain).all()
