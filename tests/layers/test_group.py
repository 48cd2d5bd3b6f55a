"""A group of linears as one product: against its layers run one after the other, in every storage and operand type."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn

from gossamer.formats import pack
from gossamer.kernels.pointwise import Rows
from gossamer.kernels.pointwise.backends import TORCH
from gossamer.layers import Difference, Execution, LinearGroup, LowRank, QuantLinear, Strength, Workspace

WIDTH = 256
OUTS = (32, 16, 48)


def group_of(layers):
    holder = nn.ModuleList(layers)
    group = LinearGroup(*((holder, str(place)) for place in range(len(layers))))
    group.holder = holder  # as a block holds its layers and their groups
    return group


def low_rank(name, out, seed, scale=0.7, bias=False):
    torch.manual_seed(seed)
    down, up = torch.randn(4, WIDTH) * 0.05, torch.randn(out, 4) * 0.05
    return LowRank(name, down, up, scale, torch.randn(out) if bias else None)


def packed_layers(storage, bias=True, seed=0):
    torch.manual_seed(seed)
    weights = [torch.randn(out, WIDTH) * 0.02 for out in OUTS]
    return [QuantLinear(pack(w, storage), torch.randn(len(w)) if bias else None) for w in weights]


OWN = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}


def executed(layers, operand, **changes):
    """The same layers with an execution in torch."""
    product = "linear" if operand.is_floating_point and operand.itemsize > 1 else "reference"
    product = "int_mm" if operand == torch.int8 else product
    options = {"activations": torch.float32, "merge": "torch", "product": product, "workspace": Workspace(), **changes}
    for layer in layers:
        decode = "none" if OWN.get(layer.packed.format) == operand else "torch"
        layer.execution = Execution(operand, decode=decode, pointwise=TORCH, **options)
    return layers


@pytest.fixture
def mixed():
    """A plain linear, one without bias, a packed one and a packed one with an adapter; 7, 3, 5 and 4 outputs."""
    torch.manual_seed(0)
    adapted = QuantLinear(pack(torch.randn(4, 64), "nf4"), torch.randn(4))
    adapted.add(LowRank("style", torch.randn(2, 64), torch.randn(4, 2), 0.5))
    packed = QuantLinear(pack(torch.randn(5, 64), "int8"))
    return [nn.Linear(64, 7), nn.Linear(64, 3, bias=False), packed, adapted]


# layers without an execution ------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_every_layer_has_its_columns(mixed):
    x = torch.randn(2, 6, 64)
    expected = torch.cat([layer(x) for layer in mixed], dim=-1)
    out = torch.empty(2, 6, 19)
    assert group_of(mixed)(Rows(x), out) is out
    assert torch.equal(out, expected)
    assert torch.equal(group_of(mixed)(Rows(x)), expected)


@torch.inference_mode()
def test_a_view_is_written_and_nothing_besides(mixed):
    x = torch.randn(2, 6, 64)
    buffer = torch.full((2, 10, 19), torch.nan)
    group_of(mixed)(Rows(x), buffer[:, 3:9])
    assert torch.equal(buffer[:, 3:9], group_of(mixed)(Rows(x)))
    assert buffer[:, :3].isnan().all()
    assert buffer[:, 9:].isnan().all()


@torch.inference_mode()
def test_a_buffer_of_another_width_is_refused(mixed):
    with pytest.raises(ValueError, match="20 columns"):
        group_of(mixed)(Rows(torch.randn(1, 2, 64)), torch.empty(1, 2, 20))


# layers that are one product ------------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("adapted", [True, False])
def test_gelu_of_the_last_outputs_and_an_input_in_parts(bias, adapted):
    layers = executed(packed_layers("nf4", bias), torch.float32)
    if adapted:
        layers[2].add(low_rank("style", OUTS[2], 1, bias=True))
    x, plain, group = torch.randn(2, 6, WIDTH), sum(OUTS[:2]), group_of(layers)
    expected = torch.cat([layer(x) for layer in layers], dim=-1)
    head, tail = group.with_gelu(Rows(x), plain)
    torch.testing.assert_close(head, expected[..., :plain])
    torch.testing.assert_close(tail, torch.nn.functional.gelu(expected[..., plain:], approximate="tanh"))
    torch.testing.assert_close(group.of_parts(x[..., :64].clone(), x[..., 64:].clone()), expected)


def test_gelu_is_part_of_a_product_of_floats_only():
    assert group_of(executed(packed_layers("nf4"), torch.bfloat16)).fuses_gelu
    assert not group_of(executed(packed_layers("nf4"), torch.int8)).fuses_gelu
    assert not group_of(packed_layers("nf4")).fuses_gelu


@torch.inference_mode()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("joined", [True, False])
def test_one_product_is_as_exact_as_its_layers(storage, bias, joined):
    x = torch.randn(2, 6, WIDTH)
    layers = packed_layers(storage, bias)
    layers[1].add(low_rank("style", OUTS[1], 1, bias=True))
    expected = torch.cat([layer(x) for layer in layers], dim=-1)
    plain = torch.cat([copy.deepcopy(layer)(x) for layer in packed_layers(storage, bias)], dim=-1)
    group = group_of(executed(layers, torch.float32))
    if joined:
        group.join()
    buffer = torch.full((2, 10, sum(OUTS)), torch.nan)
    group(Rows(x), buffer[:, 1:7])
    torch.testing.assert_close(buffer[:, 1:7], expected, rtol=1e-5, atol=1e-5)
    assert buffer[:, 7:].isnan().all()
    layers[1].remove("style")
    torch.testing.assert_close(group(Rows(x)), plain, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_joining_changes_no_byte(storage):
    layers = packed_layers(storage)
    before = [{role: tensor.clone() for role, tensor in layer.packed.tensors.items()} for layer in layers]
    group_of(executed(layers, torch.float32)).join()
    for layer, tensors in zip(layers, before, strict=True):
        now = layer.packed.tensors
        assert all(torch.equal(now[role].view(torch.uint8), tensors[role].view(torch.uint8)) for role in tensors)


@torch.inference_mode()
@pytest.mark.parametrize("operand", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("storage", ["bf16", "fp8", "int8", "nf4", "Q4_K"])
def test_eight_bit_products_are_near_the_exact_one(operand, storage):
    x = torch.randn(2, 6, WIDTH)
    layers = packed_layers(storage)
    layers[2].add(low_rank("style", OUTS[2], 2))
    exact = torch.cat([layer(x) for layer in layers], dim=-1)
    group = group_of(executed(layers, operand))
    assert group.rows_type(torch.float32) == operand
    found = group(group.rows(x, TORCH))
    error = (found - exact).norm() / exact.norm()
    assert 0 < error < (0.05 if operand == torch.float8_e4m3fn else 0.02)


@torch.inference_mode()
def test_a_change_of_scale_or_adapter_is_seen(storage):
    x, layers = torch.randn(1, 3, WIDTH), packed_layers(storage)
    group = group_of(executed(layers, torch.float32, keeps_merged=True))
    group.join()
    without = group(Rows(x))
    layers[0].add(low_rank("style", OUTS[0], 3))
    full = group(Rows(x))
    layers[0].set_scale("style", 0.35)
    half = group(Rows(x))
    torch.testing.assert_close(half - without, (full - without) / 2, rtol=1e-4, atol=1e-5)
    layers[0].set_scale("style", 0.0)
    assert torch.equal(group(Rows(x)), without)
    layers[0].remove("style")
    assert torch.equal(group(Rows(x)), without)


@torch.inference_mode()
def test_a_scale_that_passes_through_zero_between_two_calls_is_seen():
    x, layers = torch.randn(1, 3, WIDTH), packed_layers("nf4")
    group = group_of(executed(layers, torch.float32))
    without = group(Rows(x))
    layers[0].add(low_rank("style", OUTS[0], 3))
    full = group(Rows(x))
    for scale in (0.0, 0.35):  # 0.7 is as trained
        layers[0].set_scale("style", scale)
    torch.testing.assert_close(group(Rows(x)) - without, (full - without) / 2, rtol=1e-4, atol=1e-5)
    term = layers[0].remove("style")
    term.scale = 0.7
    layers[0].add(term)
    assert torch.equal(group(Rows(x)), full)


@torch.inference_mode()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("operand", [torch.float32, torch.float8_e4m3fn, torch.int8])
def test_new_scales_are_seen_in_a_merged_copy(operand, bias):
    """One layer's difference makes the whole group a merged copy, with the low-rank terms of the others in it."""

    def group_with(first, second):
        layers = packed_layers("nf4")
        layers[0].add(low_rank("style", OUTS[0], 3, first, bias))
        torch.manual_seed(4)
        layers[1].add(Difference("change", torch.randn(OUTS[1], WIDTH) * 0.02, second))
        return layers, group_of(executed(layers, operand))

    x = torch.randn(2, 6, WIDTH)
    layers, group = group_with(0.7, 0.5)
    rows = group.rows(x, TORCH)
    before = group(rows)
    for place, name, scales in ((0, "style", (0.2, 0.5)), (1, "change", (0.2, -0.4))):
        layers[place].set_scale(name, scales[place])
        expected = group_with(*scales)[1](rows)
        assert torch.equal(group(rows), expected)
        assert not torch.equal(expected, before)


@torch.inference_mode()
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("operand", [torch.float32, torch.float8_e4m3fn, torch.int8])
def test_terms_that_share_a_strength(operand, joined):
    """One write reaches all of them; one that is set alone leaves, and comes back when it shares again."""

    def group_with(*scales):
        layers = packed_layers("nf4")
        for layer, out, scale in zip(layers, OUTS, scales, strict=True):
            layer.add(low_rank("style", out, 3, scale))
        group = group_of(executed(layers, operand))
        if joined:
            group.join()
        return layers, group

    def require(*scales):
        assert torch.equal(group(rows), group_with(*scales)[1](rows))

    layers, group = group_with(0.5, 0.25, -1.0)
    rows, strength = group.rows(torch.randn(2, 6, WIDTH), TORCH), Strength(1.0)
    for layer, multiplier in zip(layers, (0.5, 0.25, -1.0), strict=True):
        layer.share("style", strength, multiplier)
    require(0.5, 0.25, -1.0)
    revisions = [layer.revision for layer in layers]
    strength.become(3.0)
    require(1.5, 0.75, -3.0)
    layers[1].set_scale("style", 0.4)
    require(1.5, 0.4, -3.0)
    strength.become(-2.0)
    require(-1.0, 0.4, 2.0)
    layers[1].share("style", strength, 0.25)
    strength.become(0.5)
    require(0.25, 0.125, -0.5)
    assert revisions == [layer.revision for layer in layers]


@torch.inference_mode()
def test_a_strength_reaches_those_who_showed_the_scale_before():
    """The only term leaves before anything ran with the shared strength, and comes back after."""
    layers, strength, x = packed_layers("nf4"), Strength(0.7), torch.randn(1, 3, WIDTH)
    term = low_rank("style", OUTS[0], 3)
    term.share(strength, 1.0)
    layers[0].add(term)
    group = group_of(executed(layers, torch.float32))
    layers[0].set_scale("style", 0.2)
    low = group(Rows(x))
    layers[0].share("style", strength, 1.0)
    full = group(Rows(x))
    strength.become(0.2)
    assert torch.equal(group(Rows(x)), low)
    assert not torch.equal(full, low)


@torch.inference_mode()
@pytest.mark.parametrize("joined", [False, True])
def test_terms_leave_the_memory_that_they_came_in(joined):
    """An adapter comes to a device in long runs of bytes, each free when none of its terms is in it any more."""
    x, layers = torch.randn(1, 3, WIDTH), packed_layers("nf4")
    run, stop = torch.randn(3 * 4 * WIDTH + 4 * sum(OUTS)) * 0.05, 0
    for layer, out in zip(layers, OUTS, strict=True):
        down = run[stop : stop + 4 * WIDTH].view(4, WIDTH)
        up = run[stop + 4 * WIDTH : stop + 4 * (WIDTH + out)].view(out, 4)
        layer.add(LowRank("style", down, up, 0.7))
        stop += 4 * (WIDTH + out)
    group = group_of(executed(layers, torch.float32))
    if joined:
        group.join()
    expected = torch.cat([layer.merged_weight() for layer in layers])
    group(Rows(x))
    held = {
        tensor.untyped_storage().data_ptr()
        for layer in layers
        for term in layer.adapters()
        for tensor in term.tensors()
    }
    assert run.untyped_storage().data_ptr() not in held
    assert torch.equal(torch.cat([layer.merged_weight() for layer in layers]), expected)


@torch.inference_mode()
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("operand", [torch.float32, torch.float8_e4m3fn, torch.int8])
def test_loaded_bytes_are_seen(storage, operand, bias, assign):
    """By what is kept of a group and of a layer alone: merged copies, row scales, biases."""
    x = torch.randn(2, 6, WIDTH)
    layers, others = packed_layers(storage, bias), packed_layers(storage, bias, seed=1)
    group, other = (group_of(executed(each, operand, keeps_merged=True)) for each in (layers, others))
    for each in (group, other):
        each.join()
    before = [group(group.rows(x, TORCH)), layers[0](x)]
    expected = [other(other.rows(x, TORCH)), others[0](x)]
    nn.ModuleList(layers).load_state_dict(nn.ModuleList(others).state_dict(), assign=assign)
    found = [group(group.rows(x, TORCH)), layers[0](x)]
    for now, then, wanted in zip(found, before, expected, strict=True):
        assert torch.equal(now, wanted)
        assert not torch.equal(now, then)


@torch.inference_mode()
@pytest.mark.parametrize("operand", [torch.float32, torch.float8_e4m3fn])
def test_loaded_bytes_are_seen_below_an_adapter(storage, operand):
    """The row scale of eight-bit floats is that of the base, measured once, and what the adapter adds."""
    x = torch.randn(2, 6, WIDTH)
    layers, others = packed_layers(storage), packed_layers(storage, seed=1)
    for layer in (layers[1], others[1]):
        layer.add(low_rank("style", OUTS[1], 1))
    group, other = (group_of(executed(each, operand)) for each in (layers, others))
    group(group.rows(x, TORCH))
    nn.ModuleList(layers).load_state_dict(nn.ModuleList(others).state_dict())
    assert torch.equal(group(group.rows(x, TORCH)), other(other.rows(x, TORCH)))


@torch.inference_mode()
def test_bytes_that_are_loaded_in_place_still_lie_side_by_side():
    layers = packed_layers("nf4")
    group = group_of(executed(layers, torch.float32))
    group.join()
    joined = group.joined
    nn.ModuleList(layers).load_state_dict(nn.ModuleList(packed_layers("nf4", seed=1)).state_dict())
    assert group.joined is joined is not None


@torch.inference_mode()
def test_another_bias_is_seen():
    x, layers = torch.randn(1, 3, WIDTH), packed_layers("nf4")
    group = group_of(executed(layers, torch.float32))
    before, alone = group(Rows(x)), layers[0](x)
    layers[0].bias = nn.Parameter(layers[0].bias + 1)
    torch.testing.assert_close(group(Rows(x))[..., : OUTS[0]], before[..., : OUTS[0]] + 1)
    torch.testing.assert_close(layers[0](x), alone + 1)
    layers[0].bias = None
    assert torch.equal(group(Rows(x))[..., OUTS[0] :], before[..., OUTS[0] :])
    assert not torch.equal(layers[0](x), alone)


@torch.inference_mode()
def test_a_merged_copy_leaves_the_stored_bytes_alone():
    x, layers = torch.randn(1, 3, WIDTH), packed_layers("fp8")
    group = group_of(executed(layers, torch.float8_e4m3fn, keeps_merged=True))
    before = [layer.packed.tensors["codes"].clone() for layer in layers]
    without = group(group.rows(x, TORCH))
    layers[1].add(low_rank("style", OUTS[1], 4))
    assert not torch.equal(group(group.rows(x, TORCH)), without)
    layers[1].remove("style")
    assert torch.equal(group(group.rows(x, TORCH)), without)
    for layer, codes in zip(layers, before, strict=True):
        assert torch.equal(layer.packed.tensors["codes"].view(torch.uint8), codes.view(torch.uint8))


@torch.inference_mode()
def test_a_copy_of_a_model_has_groups_of_its_own():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = executed(packed_layers("nf4")[:2], torch.float32)
            self.group = LinearGroup((self, "a"), (self, "b"))
            self.group.join()

    part, x = Part(), torch.randn(1, 3, WIDTH)
    before = part.group(Rows(x))
    other = copy.deepcopy(part)
    other.a.add(low_rank("style", OUTS[0], 5))
    assert not torch.equal(other.group(Rows(x)), before)
    assert torch.equal(part.group(Rows(x)), before)


@torch.inference_mode()
def test_a_layer_alone_runs_as_its_group_does():
    x = torch.randn(2, 6, WIDTH, dtype=torch.bfloat16)
    (layer,) = executed(packed_layers("nf4")[:1], torch.float8_e4m3fn)
    group = group_of([layer])
    assert torch.equal(layer(x), group(group.rows(x, TORCH)).to(torch.bfloat16))


@torch.inference_mode()
def test_the_bound_of_an_adapter_keeps_eight_bit_floats_near(storage):
    """Strong adapters, one against the other: the bound is far above what is left, and fp8 does not mind."""
    x, layers = torch.randn(2, 6, WIDTH), packed_layers(storage)
    for layer in layers:
        layer.add(low_rank("one", layer.out_features, 6, scale=2.0))
        layer.add(low_rank("other", layer.out_features, 6, scale=-1.9))
    exact = torch.cat([layer(x) for layer in layers], dim=-1)
    group = group_of(executed(layers, torch.float8_e4m3fn))
    found = group(group.rows(x, TORCH))
    assert (found - exact).norm() / exact.norm() < 0.05


# what is given up -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
@torch.inference_mode()
def test_bytes_that_moved_are_held_by_nobody(storage):
    """An operand reads the stored bytes, or is made of them: a layer that moves drops it at once."""
    (layer,) = executed(packed_layers(storage)[:1], torch.float32)
    layer(torch.randn(3, WIDTH))
    before = [weakref.ref(tensor) for tensor in layer.packed.tensors.values()]
    layer._apply(torch.clone)
    assert [reference() for reference in before] == [None] * len(before)


@torch.inference_mode()
def test_a_group_that_forgets_holds_no_bytes():
    layers = executed(packed_layers("fp32"), torch.float32)
    group = group_of(layers)
    group.join()
    group(Rows(torch.randn(1, 3, WIDTH)))
    group.forget()
    before = weakref.ref(layers[0].packed.tensors["values"].untyped_storage())
    for layer in layers:
        layer._apply(torch.clone)
    group.join()
    assert before() is None
