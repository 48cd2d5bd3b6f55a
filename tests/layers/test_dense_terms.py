"""Adapters that are not low-rank: against PEFT's own LoKr, LoHa and DoRA, on every storage format and operand type."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from gossamer.errors import AdapterError
from gossamer.formats import pack, unpack
from gossamer.kernels.pointwise.backends import TORCH
from gossamer.layers import (
    Decomposed,
    Difference,
    Execution,
    Hadamard,
    Kronecker,
    LinearGroup,
    LowRank,
    QuantLinear,
)

WIDTH, OUT, RANK = 256, 64, 4


class Holder(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.layer = nn.Linear(WIDTH, OUT, bias=False)
        self.layer.weight = nn.Parameter(weight)

    def forward(self, x):
        return self.layer(x)


def peft_layer(weight, config):
    """A linear under an adapter of PEFT whose parameters are all random."""
    model = peft.get_peft_model(Holder(weight), config)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            parameter.data = torch.randn_like(parameter) * 0.1
    return model, model.base_model.model.layer


def kronecker(weight):
    config = peft.LoKrConfig(r=RANK, alpha=2, target_modules=["layer"], decompose_factor=8)
    model, layer = peft_layer(weight, config)
    own = {kind: getattr(layer, kind)["default"] for kind in ("lokr_w1", "lokr_w2_a", "lokr_w2_b")}
    right = own["lokr_w2_a"] @ own["lokr_w2_b"]
    return model, Kronecker("a", own["lokr_w1"].data, right.data, 2 / RANK)


def hadamard(weight):
    model, layer = peft_layer(weight, peft.LoHaConfig(r=RANK, alpha=2, target_modules=["layer"]))
    factors = [getattr(layer, f"hada_{kind}")["default"].data for kind in ("w1_a", "w1_b", "w2_a", "w2_b")]
    return model, Hadamard("a", *factors, 2 / RANK)


def decomposed(weight):
    model, layer = peft_layer(weight, peft.LoraConfig(r=RANK, lora_alpha=2, target_modules=["layer"], use_dora=True))
    magnitude = layer.lora_magnitude_vector["default"].weight
    magnitude.data = magnitude.data * (1 + 0.3 * torch.rand(OUT))
    down, up = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
    return model, Decomposed("a", LowRank("a", down, up, 2 / RANK), magnitude.data[:, None])


def base_weight():
    torch.manual_seed(0)
    return torch.randn(OUT, WIDTH) * 0.05


@torch.no_grad()
@pytest.mark.parametrize("make", [kronecker, hadamard, decomposed], ids=lambda make: make.__name__)
def test_the_effect_is_that_of_peft(make, storage):
    packed = pack(base_weight(), storage)
    model, term = make(unpack(packed, torch.float32).clone())
    layer, x = QuantLinear(packed), torch.randn(3, WIDTH)
    before = layer(x)
    layer.add(term)
    torch.testing.assert_close(layer(x), model.eval()(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(layer(x), before, atol=1e-3)
    layer.remove("a")
    assert torch.equal(layer(x), before)


@torch.no_grad()
def test_scales_interpolate_and_kinds_add_up():
    weight = base_weight()
    layer = QuantLinear(pack(weight, "fp32"))
    torch.manual_seed(1)
    matrix = torch.randn(OUT, WIDTH) * 0.1
    low_rank = LowRank("low", torch.randn(2, WIDTH), torch.randn(OUT, 2), 0.3)
    _, dora = decomposed(weight)
    layer.add(Difference("diff", matrix, 0.5, bias=torch.ones(OUT)))
    layer.add(low_rank)
    layer.add(dora)
    layer.set_scale("a", 0.25)
    expected = weight + 0.5 * matrix + 0.3 * low_rank.up @ low_rank.down + 0.25 * dora.delta(weight)
    torch.testing.assert_close(layer.merged_weight(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.effective_bias(), torch.full((OUT,), 0.5))
    assert torch.equal(layer.base_weight(torch.float32), weight)


@torch.no_grad()
@pytest.mark.parametrize(
    ("operand", "most"), [(torch.float32, 1e-5), (torch.float8_e4m3fn, 0.05), (torch.int8, 0.03)], ids=str
)
@pytest.mark.parametrize("storage", ["bf16", "fp8", "nf4", "Q4_K"])
def test_a_group_merges_a_copy(storage, operand, most):
    layers = [QuantLinear(pack(base_weight(), storage)) for _ in range(2)]
    _, term = hadamard(base_weight())
    term.scale = 30.0
    layers[1].add(term)
    layers[0].add(LowRank("low", torch.randn(2, WIDTH) * 0.1, torch.randn(OUT, 2) * 0.1))
    x = torch.randn(1, 5, WIDTH)
    exact = torch.cat([layer(x) for layer in layers], dim=-1)
    product = {torch.float32: "linear", torch.int8: "int_mm"}.get(operand, "reference")
    for layer in layers:
        layer.execution = Execution(operand, torch.float32, "torch", "torch", product, TORCH)
    holder = nn.ModuleList(layers)
    group = LinearGroup((holder, "0"), (holder, "1"))
    group.join()
    found = group(group.rows(x, TORCH))
    assert (found - exact).norm() / exact.norm() < most
    layers[1].remove("a")
    assert (group(group.rows(x, TORCH)) - exact).norm() / exact.norm() > 0.05


@torch.no_grad()
@pytest.mark.parametrize("make", [kronecker, hadamard, decomposed], ids=lambda make: make.__name__)
def test_a_widened_layer_keeps_its_terms(make):
    weight = base_weight()
    _, term = make(weight)
    wide = torch.nn.functional.pad(weight, (0, 8))
    found = term.widened(WIDTH + 8).delta(wide)
    torch.testing.assert_close(found[:, :WIDTH], term.delta(weight), rtol=1e-5, atol=1e-6)
    assert not found[:, WIDTH:].any()
    torch.testing.assert_close(term.widened(WIDTH + 8).widened(WIDTH).delta(weight), term.delta(weight))


def test_a_magnitude_of_columns():
    weight = base_weight()
    torch.manual_seed(2)
    down, up, magnitude = torch.randn(2, WIDTH), torch.randn(OUT, 2), torch.rand(1, WIDTH)
    whole = weight + up @ down
    expected = magnitude * whole / whole.norm(dim=0, keepdim=True) - weight
    torch.testing.assert_close(Decomposed("a", LowRank("a", down, up), magnitude).delta(weight), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Kronecker("a", torch.zeros(2), torch.zeros(3, 4)),
        lambda: Hadamard("a", torch.zeros(4, 2), torch.zeros(2, 6), torch.zeros(4, 2), torch.zeros(2, 5)),
        lambda: Difference("a", torch.zeros(3)),
        lambda: Decomposed("a", Difference("a", torch.zeros(4, 6)), torch.zeros(6, 1)),
        lambda: Decomposed("a", Difference("a", torch.zeros(4, 6), bias=torch.zeros(4)), torch.zeros(4, 1)),
        lambda: Decomposed("a", Difference("a", torch.zeros(4, 6)), torch.zeros(1, 6), norm=torch.zeros(4, 1)),
        lambda: Difference("a", torch.zeros(3, 4), bias=torch.zeros(4)),
    ],
)
def test_parts_that_do_not_fit_are_refused(make):
    with pytest.raises(AdapterError, match="do not fit together"):
        make()


@pytest.mark.parametrize("kept", [((0, 12),), ((3, 9),), ((5, 6),), ((6, 12), (0, 6)), ((4, 7), (11, 12), (0, 1))])
def test_rows_of_a_kronecker_product(kept):
    torch.manual_seed(3)
    left, right = torch.randn(3, 2), torch.randn(4, 5)
    whole = torch.kron(left, right)
    rows = torch.cat([whole[start:stop] for start, stop in kept])
    term = Kronecker("a", left, right, kept=kept)
    assert term.shape == rows.shape
    torch.testing.assert_close(term.delta(torch.zeros(rows.shape)), rows)
    wide = term.widened(12)
    torch.testing.assert_close(wide.delta(torch.zeros(rows.shape[0], 12))[:, :10], rows)


def test_columns_that_run_through_two_layers():
    """Each half of the rows, under the norms of the whole, is what the whole would give it."""
    weight = base_weight()
    torch.manual_seed(4)
    change, magnitude = torch.randn(OUT, WIDTH) * 0.1, 1 + torch.rand(1, WIDTH)
    whole = Decomposed("a", Difference("a", change, 0.5), magnitude)
    norm = (weight + 0.5 * change).norm(dim=0, keepdim=True)
    for rows in (slice(0, 20), slice(20, OUT)):
        part = Decomposed("a", Difference("a", change[rows], 0.5), magnitude, norm=norm)
        torch.testing.assert_close(part.delta(weight[rows]), whole.delta(weight)[rows])


def test_all_tensors_of_a_dora_move_and_count():
    term = Decomposed("a", LowRank("a", torch.zeros(2, 6), torch.zeros(4, 2)), torch.ones(4, 1), bias=torch.zeros(4))
    assert term.nbytes == 4 * (12 + 8 + 4 + 4)
    term.move("meta")
    assert {tensor.device.type for tensor in term.tensors()} == {"meta"}
