"""Preparing a transformer: the choice reaches its linears, and results stay the same within the operand's error."""

from __future__ import annotations

import gc
from dataclasses import replace
from importlib.util import find_spec
from weakref import ref

import pytest
import torch

from gossamer.adapters import Adapter, LowRankTerm, attach, detach
from gossamer.errors import InvalidOptionError, UnknownOptionError
from gossamer.kernels.detect import detect
from gossamer.models.flux import from_diffusers, prepare
from gossamer.models.flux.operators import attention_in_eight_bits
from gossamer.models.flux_spec import FluxSpec, is_modulation, linear_shapes
from gossamer.models.swap import linear_layers, quantize

WIDE = {"attention_head_dim": 128, "axes_dims_rope": (16, 56, 56), "joint_attention_dim": 64, "in_channels": 64}

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="a choice for Hopper brings kernels with it")


@pytest.fixture
def packed(make_diffusers):
    """The small model, wide enough for every block format, its linears stored in one."""

    def make(storage):
        model = from_diffusers(make_diffusers(**WIDE))
        quantize(model, storage)
        return model

    return make


def adapter_of(model, seed=3):
    torch.manual_seed(seed)
    spec = FluxSpec.from_config(model.config)
    shapes = {name: shape for name, shape in linear_shapes(spec).items() if "transformer_blocks." in name}
    factors = {name: (torch.randn(4, columns), torch.randn(rows, 4)) for name, (rows, columns) in shapes.items()}
    return Adapter(spec, {name: LowRankTerm(down * 0.02, up * 0.02) for name, (down, up) in factors.items()})


@torch.inference_mode()
@pytest.mark.parametrize("storage", ["fp32", "bf16", "fp8", "int8", "nf4", "nf4-dq", "Q8_0", "Q4_K"])
def test_the_result_stays_the_same_in_float32(packed, make_inputs, storage):
    model = packed(storage)
    inputs = make_inputs(model.config, batch=2)
    expected = model(**inputs).sample
    prepared = prepare(model, "fp32")
    assert {choice.compute for choice in prepared.kinds()} == {"fp32"}
    torch.testing.assert_close(model(**inputs).sample, expected, rtol=1e-5, atol=2e-5)


@torch.inference_mode()
@pytest.mark.parametrize("storage", ["fp8", "nf4", "Q4_K"])
@pytest.mark.parametrize("keeps_merged", [True, False])
def test_adapters_come_and_go(packed, make_inputs, storage, keeps_merged):
    plain, model = packed(storage), packed(storage)
    inputs = make_inputs(model.config)
    prepare(model, "fp32", keeps_merged=keeps_merged)
    before = model(**inputs).sample
    for each in (plain, model):
        attach(each, adapter_of(each), "style")
    torch.testing.assert_close(model(**inputs).sample, plain(**inputs).sample, rtol=1e-5, atol=5e-5)
    assert not torch.allclose(model(**inputs).sample, before, atol=1e-3)
    detach(model, "style")
    assert torch.equal(model(**inputs).sample, before)


@torch.inference_mode()
def test_eight_bit_products_reach_the_blocks_alone(packed, make_inputs):
    model = packed("nf4")
    inputs = make_inputs(model.config)
    expected = model(**inputs).sample
    prepared = prepare(model, "fp8")
    computes = {name: choice.compute for name, choice in prepared.choices.items()}
    assert computes["transformer_blocks.0.attn.to_q"] == "fp8"
    assert computes["transformer_blocks.0.norm1.linear"] == "fp32"
    assert computes["x_embedder"] == computes["proj_out"] == "fp32"
    found = model(**inputs).sample
    error = ((found - expected).norm() / expected.norm()).item()
    assert 1e-4 < error < 0.1


def test_equal_choices_are_one_execution(packed):
    model = packed("nf4")
    prepare(model, "fp8")
    layers = linear_layers(model)
    assert 1 < len({id(layer.execution) for layer in layers.values()}) < 6
    spaces = {name: layer.execution.workspace for name, layer in layers.items()}
    assert len({id(space) for space in spaces.values()}) == 2
    assert len({id(space.buffers) for space in spaces.values()}) == 1
    modulation = spaces["transformer_blocks.0.norm1.linear"]
    assert {name for name, space in spaces.items() if space is modulation} == {*filter(is_modulation, layers)}


def test_a_wish_that_the_chip_cannot_meet_changes_nothing(packed):
    model = packed("nf4")
    with pytest.raises(InvalidOptionError):
        prepare(model, "fp8", capability=_turing())
    assert all(layer.execution is None for layer in linear_layers(model).values())


def _turing():
    return replace(detect("cpu"), kind="cuda", name="Turing", compute_capability=(7, 5), cuda_version=(12, 8))


# attention ------------------------------------------------------------------------------------------------------------


def _hopper():
    return replace(
        detect("cpu"), kind="cuda", name="H200", compute_capability=(9, 0), cuda_version=(13, 0), cudnn_version=91900,
        triton="3.6.0", triton_obstacle=None, flash=True,
    )  # fmt: skip


@needs_triton
@pytest.mark.parametrize(
    ("wish", "attention", "expected"),
    [
        ("fp8", "auto", "eight_bit"),
        ("auto", "auto", "eight_bit"),
        ("fp8", "exact", "cudnn"),
        ("bf16", "auto", "cudnn"),
        ("exact", "auto", "cudnn"),
        ("int8", "auto", "cudnn"),
    ],
)
def test_attention_follows_the_products_of_the_blocks_and_its_wish(packed, wish, attention, expected):
    model = packed("nf4").to(torch.bfloat16)
    prepared = prepare(model, wish, capability=_hopper(), attention=attention)
    assert prepared.attention == expected
    if expected == "eight_bit":
        assert model.operators.attention is attention_in_eight_bits
    else:
        assert model.operators.attention.keywords["attend"].keywords == {"backend": expected}


@needs_triton
def test_one_block_in_bf16_keeps_attention_exact(make_diffusers):
    """There is one backend for all blocks, and who kept one in 16 bits did not ask for eight there."""
    model = from_diffusers(make_diffusers(**WIDE)).to(torch.bfloat16)
    quantize(model, {"single_transformer_blocks.1.*": "bf16", "*": "nf4"})
    assert prepare(model, "auto", capability=_hopper()).attention == "cudnn"


def test_a_wish_for_attention_that_there_is_not(packed):
    model = packed("nf4")
    with pytest.raises(UnknownOptionError, match="precise"):
        prepare(model, "fp32", attention="precise")
    assert all(layer.execution is None for layer in linear_layers(model).values())


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
@torch.no_grad()
def test_attention_in_eight_bits_adds_what_one_more_product_in_eight_bits_would(packed, make_inputs):
    """Both round two operands to e4m3. A block has one attention beside two products at least, so errors that do not
    know of each other grow by sqrt(3 / 2) at most. The two results themselves differ by more: what follows is rounded
    anew, and two roundings of the same size that do not know of each other are sqrt(2) of one apart.
    """
    model = packed("bf16").to(torch.bfloat16).to("cuda")
    inputs = {name: value.to("cuda") for name, value in make_inputs(model.config, 2, torch.bfloat16, side=16).items()}

    def result(wish, attention, expected):
        prepared = prepare(model, wish, attention=attention)
        assert prepared.attention == expected
        return model(**inputs).sample.double()

    def between(one, other):
        return ((one - other).norm() / other.norm()).item()

    plain = result("bf16", "auto", "cudnn")
    products, both = result("fp8", "exact", "cudnn"), result("fp8", "auto", "eight_bit")
    assert 0 < between(both, products) < 2 * between(products, plain)
    assert between(both, plain) < 1.3 * between(products, plain)


@torch.no_grad()
@pytest.mark.parametrize(("storage", "wish"), [("nf4", "fp8"), ("fp8", "fp8"), ("Q4_K", "fp32")])
def test_it_compiles_as_one_graph(packed, make_inputs, storage, wish):
    """For people who compile anyway: kernels are opaque operators, and nothing breaks the graph."""
    model = packed(storage)
    inputs = {**make_inputs(model.config), "return_dict": False}
    prepare(model, wish)
    attach(model, adapter_of(model), "style")
    expected = model(**inputs)[0]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(compiled(**inputs)[0], expected, rtol=1e-5, atol=1e-5)


def test_a_model_that_nobody_needs_is_gone_at_once(make_diffusers):
    """Its memory may be most of a GPU's, and Python looks for cycles when it likes."""
    model = from_diffusers(make_diffusers())
    quantize(model, "nf4")
    prepare(model, "bf16")
    held = [ref(part) for part in model.modules()]
    gc.collect()
    gc.disable()
    try:
        del model
        assert [part() for part in held] == [None] * len(held)
    finally:
        gc.enable()
