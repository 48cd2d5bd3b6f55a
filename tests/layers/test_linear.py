"""QuantLinear against a dense product with the unpacked weight, and adapters against PEFT, on every storage format."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from gossamer.errors import AdapterError
from gossamer.formats import pack, unpack
from gossamer.layers import LowRank, QuantLinear

WIDTH, OUT, RANK = 256, 24, 4


def layer_of(storage, bias=True, compute=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, WIDTH, generator=generator) * 0.02
    return QuantLinear(pack(weight, storage), torch.randn(OUT, generator=generator) if bias else None, compute)


def low_rank_of(name="a", in_features=WIDTH, scale=1.0, bias=False, seed=1):
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(RANK, in_features, generator=generator) * 0.05
    up = torch.randn(OUT, RANK, generator=generator) * 0.05
    return LowRank(name, down, up, scale, torch.randn(OUT, generator=generator) if bias else None)


def state_bytes(layer):
    return {key: tensor.contiguous().view(torch.uint8).clone() for key, tensor in layer.state_dict().items()}


def assert_same_state(layer, before):
    now = state_bytes(layer)
    assert now.keys() == before.keys()
    assert all(torch.equal(now[key], before[key]) for key in now)


# base -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_the_unpacked_weight(storage, bias, compute):
    layer = layer_of(storage, bias, compute)
    x = torch.randn(2, 5, WIDTH)
    expected = F.linear(x.to(compute), unpack(layer.packed, compute), None if not bias else layer.bias.to(compute))
    assert torch.equal(layer(x), expected.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_result_has_the_type_of_the_input(dtype):
    assert layer_of("nf4")(torch.randn(3, WIDTH).to(dtype)).dtype == dtype


@given(out=st.integers(1, 40), width=st.integers(1, 80), tokens=st.integers(0, 5), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("base_storage", ["fp32", "bf16", "fp8", "int8", "nf4", "fp4-dq"])
def test_any_shape(base_storage, out, width, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    layer = QuantLinear(pack(torch.randn(out, width, generator=generator), base_storage))
    down, up = torch.randn(2, width, generator=generator), torch.randn(out, 2, generator=generator)
    layer.add(LowRank("a", down, up, 0.5))
    x = torch.randn(tokens, width, generator=generator)
    dense = unpack(layer.packed, torch.float64) + 0.5 * up.double() @ down.double()
    torch.testing.assert_close(layer(x).double(), x.double() @ dense.T, atol=1e-3, rtol=1e-4)


def test_gradients_reach_the_input_and_inference_mode_works(storage):
    layer = layer_of(storage)
    layer.add(low_rank_of())
    x = torch.randn(3, WIDTH, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, -1))
    with torch.inference_mode():
        assert torch.equal(layer(x), layer(x))


# adapters -------------------------------------------------------------------------------------------------------------


class OneLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, OUT)

    def forward(self, x):
        return self.linear(x)


@pytest.fixture(scope="module")
def peft_model():
    """Two adapters of PEFT on a dense linear; the second has a bias of its own."""
    torch.manual_seed(0)
    common = {"target_modules": ["linear"], "init_lora_weights": False}
    model = peft.get_peft_model(OneLinear(), peft.LoraConfig(r=4, lora_alpha=6, **common), "one")
    model.add_adapter("two", peft.LoraConfig(r=8, lora_alpha=4, lora_bias=True, **common))
    nn.init.normal_(model.base_model.model.linear.lora_B["two"].bias)
    model.base_model.set_adapter(["one", "two"])
    return model.requires_grad_(False).eval()


def as_low_rank(linear, name):
    up = linear.lora_B[name]
    return LowRank(
        name, linear.lora_A[name].weight.data, up.weight.data, linear.scaling[name], getattr(up, "bias", None)
    )


@torch.no_grad()
def test_adapter_arithmetic_is_that_of_peft(storage, peft_model):
    linear = peft_model.base_model.model.linear
    layer = layer_of(storage)
    linear.base_layer.weight.copy_(unpack(layer.packed, torch.float32))
    linear.base_layer.bias.copy_(layer.bias)
    for name in ("one", "two"):
        layer.add(as_low_rank(linear, name))
    x = torch.randn(7, WIDTH)
    torch.testing.assert_close(layer(x), peft_model(x), atol=2e-5, rtol=1e-5)
    layer.remove("one")
    peft_model.base_model.set_adapter(["two"])
    torch.testing.assert_close(layer(x), peft_model(x), atol=2e-5, rtol=1e-5)
    peft_model.base_model.set_adapter(["one", "two"])


def test_removal_leaves_every_byte_and_every_result_as_it_was(storage):
    layer = layer_of(storage)
    x = torch.randn(3, WIDTH)
    before, y = state_bytes(layer), layer(x)
    layer.add(low_rank_of("a", scale=0.7))
    layer.add(low_rank_of("b", scale=-1.3, bias=True, seed=2))
    assert not torch.equal(layer(x), y)
    assert_same_state(layer, before)
    layer.remove("a")
    layer.remove("b")
    assert layer.names() == ()
    assert_same_state(layer, before)
    assert torch.equal(layer(x), y)


def test_the_scale_may_change_between_two_calls(storage):
    layer = layer_of(storage)
    x = torch.randn(3, WIDTH)
    base = layer(x)
    layer.add(low_rank_of(scale=0.0, bias=True))
    assert torch.equal(layer(x), base)
    layer.set_scale("a", 1.0)
    one = layer(x) - base
    layer.set_scale("a", 2.0)
    torch.testing.assert_close(layer(x) - base, 2 * one, atol=1e-4, rtol=1e-4)
    layer.set_scale("a", 0.0)
    assert torch.equal(layer(x), base)


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
def test_base_and_adapter_are_summed_before_the_one_rounding(storage, compute):
    layer = layer_of(storage, compute=compute)
    low_rank = low_rank_of(scale=1e-2)
    layer.add(low_rank)
    exact = torch.addmm(unpack(layer.packed, torch.float32), low_rank.up, low_rank.down, alpha=1e-2)
    assert torch.equal(layer.effective_weight(), exact.to(compute))


def test_an_adapter_smaller_than_the_formats_own_step_does_not_vanish():
    layer = layer_of("nf4", bias=False)
    low_rank = low_rank_of(scale=1e-4)
    layer.add(low_rank)
    change = layer.effective_weight() - layer.base_weight(torch.float32)
    torch.testing.assert_close(change, 1e-4 * low_rank.up @ low_rank.down, atol=1e-8, rtol=1e-2)


def test_an_adapter_brings_a_bias_to_a_layer_without_one():
    layer = layer_of("nf4", bias=False)
    assert layer.effective_bias() is None
    low_rank = low_rank_of(scale=0.5, bias=True)
    layer.add(low_rank)
    assert torch.equal(layer.effective_bias(), 0.5 * low_rank.bias)
    layer.remove("a")
    assert layer.effective_bias() is None


def test_adapter_mistakes_are_errors():
    layer = layer_of("nf4")
    layer.add(low_rank_of())
    with pytest.raises(AdapterError, match="already attached"):
        layer.add(low_rank_of())
    with pytest.raises(AdapterError, match="does not fit"):
        layer.add(low_rank_of("wide", in_features=WIDTH * 2))
    with pytest.raises(AdapterError, match="does not fit"):
        layer.add(LowRank("tall", torch.zeros(2, WIDTH), torch.zeros(OUT + 1, 2)))
    for call in (lambda: layer.remove("b"), lambda: layer.set_scale("b", 1.0)):
        with pytest.raises(AdapterError, match="Attached: a"):
            call()
    assert layer.names() == ("a",)


# width ----------------------------------------------------------------------------------------------------------------


def test_widening_keeps_the_bytes_and_is_undone_exactly(storage):
    layer = layer_of(storage)
    x = torch.randn(3, WIDTH)
    before, y = state_bytes(layer), layer(x)
    layer.widen(2 * WIDTH)
    assert layer.in_features == 2 * WIDTH
    assert_same_state(layer, before)
    wide = layer.base_weight(torch.float32)
    assert torch.equal(wide[:, :WIDTH], unpack(layer.packed, torch.float32))
    assert not wide[:, WIDTH:].any()
    torch.testing.assert_close(layer(torch.cat((x, torch.randn(3, WIDTH)), 1)), y)
    control = low_rank_of("control", in_features=2 * WIDTH, bias=True)
    layer.add(control)
    both = torch.randn(3, 2 * WIDTH)
    dense = wide + control.up @ control.down
    torch.testing.assert_close(layer(both), F.linear(both, dense, layer.bias + control.bias), atol=1e-5, rtol=1e-5)
    layer.remove("control")
    layer.narrow()
    assert_same_state(layer, before)
    assert torch.equal(layer(x), y)


def test_widening_does_not_strand_an_adapter_or_cut_the_weight():
    layer = layer_of("nf4")
    with pytest.raises(AdapterError, match="cannot take inputs"):
        layer.widen(WIDTH - 1)
    layer.add(low_rank_of())
    with pytest.raises(AdapterError, match="a is attached"):
        layer.widen(2 * WIDTH)
    layer.remove("a")
    layer.widen(2 * WIDTH)
    layer.add(low_rank_of("control", in_features=2 * WIDTH))
    with pytest.raises(AdapterError, match="control is attached"):
        layer.narrow()
    assert layer.in_features == 2 * WIDTH


# as a module ----------------------------------------------------------------------------------------------------------


def test_a_cast_changes_compute_and_bias_but_neither_bytes_nor_adapters(storage):
    layer = layer_of(storage)
    low_rank = low_rank_of()
    layer.add(low_rank)
    before = {key: value for key, value in state_bytes(layer).items() if key != "bias"}
    layer.to(torch.bfloat16)
    assert layer.compute == layer.bias.dtype == layer.weight.dtype == torch.bfloat16
    assert low_rank.down.dtype == torch.float32
    assert all(torch.equal(state_bytes(layer)[key], value) for key, value in before.items())
    assert layer(torch.randn(3, WIDTH, dtype=torch.bfloat16)).dtype == torch.bfloat16
    layer.float()
    assert layer.compute == torch.float32


def test_a_move_takes_the_adapters_along():
    layer = layer_of("nf4-dq")
    layer.add(low_rank_of(bias=True))
    layer.to("meta")
    (low_rank,) = layer.adapters()
    assert all(tensor.is_meta for tensor in (*low_rank.tensors(), *layer.parameters(), *layer.buffers()))
    assert layer.compute == torch.float32


def test_state_dict_round_trip(storage):
    source, target = layer_of(storage), layer_of(storage, seed=9)
    x = torch.randn(3, WIDTH)
    assert not torch.equal(source(x), target(x))
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(x), target(x))


def test_a_copy_is_independent():
    layer = layer_of("nf4")
    layer.add(low_rank_of())
    twin = copy.deepcopy(layer)
    twin.set_scale("a", 3.0)
    twin.packed.tensors["codes"].zero_()
    assert next(layer.adapters()).scale == 1.0
    assert layer.packed.tensors["codes"].any()
