import weakref

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from peft import LoraConfig
from PIL import Image

import gossamer
from gossamer import adapters
from gossamer.demo.embedded import model_folder
from gossamer.errors import AdapterError, GossamerError, InvalidOptionError, UnknownOptionError, WrongModelError
from gossamer.layers import QuantLinear
from gossamer.models.flux import FluxTransformer, from_diffusers
from gossamer.models.flux_spec import linear_shapes
from gossamer.pipeline.options import PaintOptions

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "a red sphere on top of a blue cube"
QUICK = {"steps": 2, "size": (64, 64)}


def pixels(image):
    return np.asarray(image)


def stored_bytes(pipe):
    state = pipe.transformer.state_dict()
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in state.items()}


def diffusers_pipeline():
    return FluxPipeline.from_pretrained(model_folder(), torch_dtype=torch.float32)


def line_map(size=64):
    """White on black, different each time, as an edge map is."""
    return Image.effect_noise((size, size), 90).point(lambda level: 255 if level > 200 else 0).convert("RGB")


@pytest.fixture(scope="module")
def expected():
    """What diffusers paints from the folder, unchanged, in float32."""
    pipe = diffusers_pipeline()
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(3)
    options = {"height": 64, "width": 64, "max_sequence_length": 64, "guidance_scale": 3.5}
    return pixels(pipe(PROMPT, generator=generator, num_inference_steps=2, **options).images[0])


def test_fp32_storage_paints_what_diffusers_paints_unchanged(expected):
    pipe = gossamer.load(storage="fp32", text_storage="fp32")
    assert (pixels(pipe(PROMPT, seed=3, **QUICK)) == expected).all()


def test_the_stored_type_is_lossless(expected):
    pipe = gossamer.load()
    assert pipe.report.packed["transformer_blocks.0.attn.to_q"] == "bf16"
    assert (pixels(pipe(PROMPT, seed=3, **QUICK)) == expected).all()


def test_one_seed_is_one_picture(pipe):
    first, again, other = (pixels(pipe(PROMPT, seed=seed, **QUICK)) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    assert first.shape == (64, 64, 3)


def test_defaults_come_from_the_model(pipe):
    recipe = pipe.paint(PaintOptions(PROMPT, steps=1)).recipe
    assert (recipe.width, recipe.height) == (256, 256)
    assert recipe.max_sequence_length == 64
    assert (recipe.storage, recipe.text_storage) == ("nf4", "bf16")


def test_every_linear_is_swapped_and_sensitive_ones_stay_as_stored(pipe, embedded_spec):
    layers = gossamer.linear_layers(pipe.transformer)
    assert set(layers) == set(linear_shapes(embedded_spec))
    assert layers["transformer_blocks.0.attn.to_q"].packed.format == "nf4"
    assert layers["x_embedder"].packed.format == "bf16"
    assert pipe.kept_layers["proj_out"] == "bf16"
    assert "single_transformer_blocks.0.proj_out" not in pipe.kept_layers


def test_skip_keeps_layers_as_stored():
    pipe = gossamer.load(storage="nf4", skip=["single_transformer_blocks.0.*"])
    assert pipe.report.packed["single_transformer_blocks.0.proj_mlp"] == "bf16"
    assert pipe.report.packed["single_transformer_blocks.1.proj_mlp"] == "nf4"


def test_weight_bytes_shrink(pipe):
    assert pipe.weight_bytes == gossamer.weight_bytes(pipe.transformer)
    assert pipe.weight_bytes == pipe.report.bytes_after < 0.25 * pipe.report.bytes_before


def test_optimize_takes_a_diffusers_pipeline_as_it_is(expected):
    pipe = diffusers_pipeline()
    theirs = weakref.ref(pipe.transformer)
    weights = {parameter.data_ptr() for parameter in pipe.text_encoder_2.parameters()}
    taken = gossamer.optimize(pipe, storage="fp32")
    assert isinstance(pipe.transformer, FluxTransformer)
    assert theirs() is None, "the original would keep every unpacked weight alive"
    assert isinstance(pipe.transformer.proj_out, QuantLinear)
    linears = gossamer.linear_layers(pipe.text_encoder_2).values()
    assert linears, "adapters with terms for it attach"
    assert all(layer.packed.tensors["values"].data_ptr() in weights for layer in linears), "not a copy"
    assert (pixels(taken(PROMPT, seed=3, **QUICK)) == expected).all()


def test_optimize_takes_a_pipeline_that_holds_our_transformer(expected):
    pipe = diffusers_pipeline()
    ours = pipe.transformer = from_diffusers(pipe.transformer)
    taken = gossamer.optimize(pipe, storage="fp32")
    assert taken.transformer is ours
    assert (pixels(taken(PROMPT, seed=3, **QUICK)) == expected).all()


def test_load_paints_with_our_transformer(pipe):
    assert isinstance(pipe.transformer, FluxTransformer)


def test_optimize_equals_load():
    pipe = diffusers_pipeline()
    taken = gossamer.optimize(pipe, storage="nf4", skip=["proj_out"], text_storage="int8")
    assert gossamer.linear_layers(pipe.text_encoder)
    assert gossamer.linear_layers(pipe.text_encoder_2)
    loaded = gossamer.load(storage="nf4", text_storage="int8")
    assert (pixels(taken(PROMPT, seed=3, **QUICK)) == pixels(loaded(PROMPT, seed=3, **QUICK))).all()


def test_optimize_leaves_text_encoders_that_were_quantised_before():
    pipe = diffusers_pipeline()
    gossamer.quantize(pipe.text_encoder_2, "int8")
    before = dict(gossamer.linear_layers(pipe.text_encoder_2))
    gossamer.optimize(pipe, storage="nf4")
    assert gossamer.linear_layers(pipe.text_encoder_2) == before
    assert gossamer.linear_layers(pipe.text_encoder)


def test_optimize_refuses_a_pipeline_with_peft_adapters():
    pipe = diffusers_pipeline()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(AdapterError, match="PEFT"):
        gossamer.optimize(pipe)


def test_optimize_refuses_other_pipelines():
    with pytest.raises(WrongModelError, match="cannot be optimised"):
        gossamer.optimize(object(), storage="nf4")


# adapters


def test_an_adapter_acts_and_leaves_no_trace(pipe, bundled):
    before, plain = stored_bytes(pipe), pixels(pipe(PROMPT, **QUICK))
    assert pipe.attach("pencil:0.5") == "pencil"
    half = pixels(pipe(PROMPT, **QUICK))
    pipe.set_scale("pencil", 1.0)
    assert pipe.adapters == {"pencil": 1.0}
    full = pixels(pipe(PROMPT, **QUICK))
    pipe.detach("pencil")
    assert (half != plain).any()
    assert (full != half).any()
    assert (pixels(pipe(PROMPT, **QUICK)) == plain).all()
    assert stored_bytes(pipe) == before


def test_load_attaches_in_order(bundled):
    pipe = gossamer.load(storage="nf4", loras=["pencil:0.25"])
    assert pipe.adapters == {"pencil": 0.25}
    picture = pipe(PROMPT, **QUICK)
    assert "pencil: " in picture.info["parameters"]


def test_control_needs_a_control_lora_and_the_other_way_round(pipe, bundled):
    guide = line_map()
    before = stored_bytes(pipe)
    with pytest.raises(InvalidOptionError, match="nothing attached reads one"):
        pipe(PROMPT, control=guide, **QUICK)
    pipe.attach("edges")
    with pytest.raises(InvalidOptionError, match="control picture is needed"):
        pipe(PROMPT, **QUICK)
    first = pixels(pipe(PROMPT, control=guide, **QUICK))
    other = pixels(pipe(PROMPT, control=Image.new("RGB", (64, 64)), **QUICK))
    pipe.attach("pencil")
    styled = pixels(pipe(PROMPT, control=guide, **QUICK))
    pipe.detach("edges")
    pipe.detach("pencil")
    assert (first != other).any()
    assert (first != styled).any()
    assert stored_bytes(pipe) == before
    assert pipe.transformer.config.in_channels == 64


def test_the_kind_of_a_control_picture_is_decided_once_and_recorded(pipe, bundled):
    photo = Image.effect_noise((64, 64), 30).convert("RGB")
    pipe.attach("edges")
    try:
        with pytest.raises(InvalidOptionError, match="is no edge map") as caught:
            pipe(PROMPT, control=photo, **QUICK)
        assert "grey or coloured" in caught.value.why
        assert "control_kind='picture'" in caught.value.next_step
        guide, painted = line_map(), {}
        for kind, control in (("auto", guide), ("map", guide), ("picture", guide), ("map", photo), ("picture", photo)):
            options = PaintOptions(PROMPT, steps=2, size=(64, 64), control=control, control_kind=kind)
            painting = pipe.paint(options)
            assert painting.recipe.control.kind == ("map" if kind == "auto" else kind)
            painted[kind, control is photo] = painting
        assert painted["auto", False].recipe == painted["map", False].recipe
        assert painted["auto", False].pixels_sha256 == painted["map", False].pixels_sha256
        assert painted["map", True].pixels_sha256 != painted["picture", True].pixels_sha256
    finally:
        pipe.detach("edges")


# overflow


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_picture_with_values_that_are_not_finite_is_refused(pipe, bundled):
    plain = pixels(pipe(PROMPT, **QUICK))
    pipe.attach("pencil:1e38")
    try:
        with pytest.raises(InvalidOptionError, match="picture of seed 7 holds values that are not finite") as caught:
            pipe(PROMPT, seed=7, **QUICK)
        assert "pencil at scale 1e+38" in caught.value.why
        assert "smaller scales" in caught.value.next_step
    finally:
        pipe.detach("pencil")
    bias = pipe.transformer.proj_out.bias
    before = bias.detach().clone()
    try:
        bias.data[:] = float("nan")
        with pytest.raises(InvalidOptionError, match="not finite") as caught:
            pipe(PROMPT, **QUICK)
        assert "adapters" not in caught.value.next_step
    finally:
        bias.data.copy_(before)
    assert (pixels(pipe(PROMPT, **QUICK)) == plain).all()


def test_scales_that_no_product_can_use_are_refused(pipe, bundled):
    before = stored_bytes(pipe)
    with pytest.raises(AdapterError, match="cannot act at scale 1e\\+39"):
        pipe.attach("pencil:1e39")
    assert pipe.adapters == {}
    assert stored_bytes(pipe) == before
    pipe.attach("pencil")
    try:
        with pytest.raises(AdapterError, match="cannot act at scale"):
            pipe.set_scale("pencil", -1e300)
        assert pipe.adapters == {"pencil": 1.0}
    finally:
        pipe.detach("pencil")


def test_an_adapter_is_attached_once(pipe, bundled):
    pipe.attach("pencil")
    try:
        with pytest.raises(AdapterError):
            gossamer.load(loras=["pencil", str(bundled["pencil"])])
        with pytest.raises(AdapterError):
            pipe.attach("pencil")
        with pytest.raises(AdapterError, match="Attached: pencil"):
            pipe.detach("neon")
        assert pipe.adapters == {"pencil": 1.0}
    finally:
        pipe.detach("pencil")


def test_adapters_behind_the_pipeline_s_back(pipe, bundled):
    pipe.attach("pencil")
    adapters.set_scale(pipe.transformer, "pencil", 0.5)
    try:
        with pytest.raises(AdapterError, match="behind the pipeline"):
            pipe(PROMPT, **QUICK)
    finally:
        pipe.detach("pencil")


# options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"seed": True}, "seed"),
        ({"steps": 0}, "steps"),
        ({"steps": -3}, "steps"),
        ({"guidance": float("nan")}, "guidance"),
        ({"guidance": -1.0}, "guidance"),
        ({"guidance": 1e39}, "from 0 to 1000"),
        ({"guidance": 10**400}, "from 0 to 1000"),
        ({"size": (100, 64)}, "nearest size is 96x64"),
        ({"size": "64by64"}, "not a size"),
        ({"max_sequence_length": 513}, "max_sequence_length"),
        ({"control_kind": "depth"}, "map, picture"),
        ({"control_kind": "picture"}, "without a control picture"),
        ({"control_kind": "map"}, "without a control picture"),
        ({"control": 7}, "nothing attached reads one"),
    ],
)
def test_bad_values_are_refused(pipe, options, words):
    with pytest.raises(InvalidOptionError, match=words):
        pipe(PROMPT, **{**QUICK, **options})


@pytest.mark.parametrize("prompt", ["", "  \n", "a\0b", "\udcff", None])
def test_bad_prompts_are_refused(pipe, prompt):
    with pytest.raises(InvalidOptionError, match="prompt"):
        pipe(prompt, **QUICK)


def test_unknown_options_name_the_nearest(pipe):
    with pytest.raises(UnknownOptionError, match="'guidance'"):
        pipe(PROMPT, guidence=3)
    with pytest.raises(UnknownOptionError, match="'storage'"):
        gossamer.load(storag="nf4")
    with pytest.raises(UnknownOptionError, match="transformer_blocks"):
        gossamer.load(storage="nf4", skip=["transformer_blocks.9.*"])


@pytest.mark.parametrize(
    "options",
    [{"storage": "nf5"}, {"text_storage": "nf5"}, {"device": "tpu"}, {"device": "cuda:77"}, {"loras": ["pensil"]}],
)
def test_load_checks_before_it_loads(options, bundled):
    with pytest.raises(GossamerError) as caught:
        gossamer.load(**options)
    assert caught.value.what
    assert caught.value.why
    assert caught.value.next_step
