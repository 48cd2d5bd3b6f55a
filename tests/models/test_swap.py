"""Swapping linears in any module: the text encoders, mixtures, what is kept and why, and exact bytes."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from gossamer import formats
from gossamer.errors import InvalidOptionError, UnknownOptionError, UnknownStorageError
from gossamer.formats import packed_bytes, unpack
from gossamer.layers import LowRank, QuantLinear
from gossamer.models import swap
from gossamer.models.swap import linear_layers, quantize, weight_bytes


class Block(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 64), Block(), Block(), nn.Linear(64, 8)).eval().requires_grad_(False)


def dense_twin(model, twin):
    """Give a dense copy the unpacked weights of a quantised model."""
    for name, layer in linear_layers(model).items():
        twin.get_submodule(name).weight.copy_(unpack(layer.packed, torch.float32))
    return twin


def t5():
    config = T5Config(
        vocab_size=99, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config)


def clip():
    config = CLIPTextConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=98,
    )
    return CLIPTextModel(config)


# swapping -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["fp32", "bf16", "fp8", "int8", "nf4", "fp4-dq", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("make", [t5, clip])
@torch.no_grad()
def test_text_encoders_run_as_their_dense_twin(make, storage):
    torch.manual_seed(0)
    model = make().eval()
    twin = make().eval()
    twin.load_state_dict(model.state_dict())
    report = quantize(model, storage)
    assert not report.kept
    assert not any(type(child) is nn.Linear for child in model.modules())
    tokens = torch.randint(0, 98, (2, 7))
    expected = dense_twin(model, twin)(tokens).last_hidden_state
    torch.testing.assert_close(model(tokens).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_half_precision_text_encoders_run_and_answer_in_their_type():
    for make in (t5, clip):
        model = make().eval().to(torch.bfloat16)
        quantize(model, "nf4", compute=torch.bfloat16)
        assert model(torch.randint(0, 98, (1, 7))).last_hidden_state.dtype == torch.bfloat16


@torch.no_grad()
def test_the_report_counts_exact_bytes():
    model = network()
    report = quantize(model, "nf4-dq")
    shapes = {
        "0": (64, 20),
        "1.up": (128, 64),
        "1.down": (64, 128),
        "2.up": (128, 64),
        "2.down": (64, 128),
        "3": (8, 64),
    }
    assert report.packed == dict.fromkeys(shapes, "nf4-dq")
    rest = 4 * (64 + 8 + 2 * (64 + 64 + 128))
    assert report.bytes_before == rest + sum(4 * out * width for out, width in shapes.values())
    assert report.bytes_after == rest + sum(packed_bytes("nf4-dq", *shape) for shape in shapes.values())
    assert weight_bytes(model) == report.bytes_after
    layer = linear_layers(model)["1.up"]
    layer.add(LowRank("a", torch.zeros(2, 64), torch.zeros(128, 2)))
    assert weight_bytes(model) == report.bytes_after + 4 * 2 * (64 + 128)


def test_originals_are_freed():
    model = network()
    originals = [weakref.ref(parameter) for parameter in model.parameters() if parameter.dim() == 2]
    quantize(model, "int8")
    gc.collect()
    assert not any(reference() is not None for reference in originals)


def test_only_one_original_and_its_copy_live_at_a_time(monkeypatch):
    model = network()
    originals = [weakref.ref(child) for child in model.modules() if isinstance(child, nn.Linear)]
    alive = []

    def counting_pack(weight, storage):
        alive.append(sum(reference() is not None for reference in originals))
        return formats.pack(weight, storage)

    monkeypatch.setattr(swap, "pack", counting_pack)
    quantize(model, "nf4")
    assert alive == [6, 5, 4, 3, 2, 1]


@torch.no_grad()
def test_a_mixture_of_formats_by_pattern():
    model = network()
    report = quantize(model, {"*.up": "nf4", "1.*": "int8", "3": "FP8"})
    assert report.packed == {"1.up": "nf4", "1.down": "int8", "2.up": "nf4", "3": "fp8"}
    assert set(report.kept) == {"0", "2.down"}
    assert {name: layer.packed.format for name, layer in linear_layers(model).items()} == {
        **report.packed,
        "0": "fp32",
        "2.down": "fp32",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_skipped_layers_keep_their_numbers_and_take_adapters(dtype):
    model = network().to(dtype)
    x = torch.randn(2, 20).to(dtype)
    first = model[0](x)
    address = model[0].weight.data_ptr()
    report = quantize(model, "nf4", skip=["0", "*.down"])
    assert report.kept == {"0": "skipped by '0'", "1.down": "skipped by '*.down'", "2.down": "skipped by '*.down'"}
    assert torch.equal(model[0](x), first)
    assert model[0].packed.tensors["values"].data_ptr() == address
    model[0].add(LowRank("a", torch.ones(1, 20), torch.ones(64, 1)))
    assert not torch.equal(model[0](x), first)


def test_one_pattern_may_stand_alone():
    assert set(quantize(network(), "nf4", skip="*.down").kept) == {"1.down", "2.down"}


def test_a_width_that_does_not_fit_is_kept_with_the_reason():
    report = quantize(network(), "Q8_0")
    assert report.kept == {"0": "20 input features are not a multiple of 32, as Q8_0 needs"}
    assert len(report.packed) == 5


def test_compute_type():
    assert {layer.compute for layer in linear_layers(swapped(network())).values()} == {torch.float32}
    assert {layer.compute for layer in linear_layers(swapped(network().bfloat16())).values()} == {torch.float32}
    chosen = swapped(network(), compute=torch.float16)
    assert {layer.compute for layer in linear_layers(chosen).values()} == {torch.float16}


def swapped(model, **options):
    quantize(model, "nf4", **options)
    return model


# sharing --------------------------------------------------------------------------------------------------------------


def test_tied_weights_stay_tied():
    model = nn.ModuleDict({"a": nn.Linear(64, 32), "b": nn.Linear(64, 32), "c": nn.Linear(64, 32)})
    model["b"].weight = model["a"].weight
    quantize(model, "nf4")
    assert model["a"].stored is model["b"].stored
    assert model["a"].stored is not model["c"].stored
    assert not torch.equal(model["a"].bias, model["b"].bias)
    assert weight_bytes(model) == 2 * packed_bytes("nf4", 32, 64) + 3 * 32 * 4
    model.to("meta")
    assert model["a"].packed.tensors["codes"] is model["b"].packed.tensors["codes"]


def test_one_linear_under_two_names_stays_one():
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": shared, "b": shared})
    report = quantize(model, "nf4")
    assert model["a"] is model["b"]
    assert isinstance(model["a"], QuantLinear)
    assert set(report.packed) == set(linear_layers(model)) == {"a", "b"}


# what is left alone ---------------------------------------------------------------------------------------------------


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_a_swap_could_break_is_left_alone_with_the_reason():
    model = nn.ModuleDict(
        {
            "subclass": Doubling(64, 64),
            "hooked": nn.Linear(64, 64),
            "wide": nn.Linear(64, 64).double(),
            "embedding": nn.Embedding(32, 64),
            "head": nn.Linear(64, 32, bias=False),
            "fine": nn.Linear(64, 64),
        }
    )
    model["head"].weight = model["embedding"].weight
    model["hooked"].register_forward_hook(lambda module, inputs, output: output)
    before = {name: child for name, child in model.named_children() if name != "fine"}
    report = quantize(model, "nf4")
    assert report.packed == {"fine": "nf4"}
    assert set(report.kept) == {"subclass", "hooked", "wide", "head"}
    assert "Doubling" in report.kept["subclass"]
    assert "hooks" in report.kept["hooked"]
    assert "float64" in report.kept["wide"]
    assert "'embedding'" in report.kept["head"]
    assert all(model[name] is child for name, child in before.items())


@torch.no_grad()
def test_attention_of_torch_runs_on_a_swapped_projection():
    attention = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    twin = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    twin.load_state_dict(attention.state_dict())
    assert isinstance(attention.out_proj, NonDynamicallyQuantizableLinear)
    quantize(attention, "nf4")
    x = torch.randn(2, 5, 64)
    torch.testing.assert_close(attention(x, x, x)[0], dense_twin(attention, twin)(x, x, x)[0])


# mistakes -------------------------------------------------------------------------------------------------------------


def test_a_pattern_that_fits_nothing_names_the_nearest():
    for options in ({"storage": "nf4", "skip": ["1.upp"]}, {"storage": {"1.upp": "nf4"}}):
        model = network()
        with pytest.raises(UnknownOptionError, match=r"1\.up"):
            quantize(model, **options)
        assert not linear_layers(model)


def test_an_unknown_format_touches_nothing():
    model = network()
    for storage in ("nf5", {"*.up": "nf4", "*.down": "nf5"}):
        with pytest.raises(UnknownStorageError):
            quantize(model, storage)
    assert not linear_layers(model)


def test_quantising_twice_is_refused():
    model = swapped(network())
    with pytest.raises(InvalidOptionError, match="already quantised"):
        quantize(model, "nf4")


@pytest.mark.parametrize("module", [nn.Linear(64, 64)])
def test_a_bare_linear_is_refused(module):
    with pytest.raises(InvalidOptionError, match="parent"):
        quantize(module, "nf4")


def test_a_weight_with_nan_names_its_layer():
    model = network()
    model[2].up.weight[0, 0] = float("nan")
    with pytest.raises(InvalidOptionError, match=r"Layer '2\.up'.*NaN"):
        quantize(model, "nf4")


def test_linears_are_found_under_every_name_and_in_torch_s_order():
    model = network()
    model.again = model[1]
    quantize(model, "int8")
    named = model.named_modules(remove_duplicate=False)
    expected = {name: module for name, module in named if isinstance(module, QuantLinear)}
    found = linear_layers(model)
    assert list(found.items()) == list(expected.items())
    assert found["1.up"] is found["again.up"]
    assert linear_layers(model[0]) == {"": model[0]}
