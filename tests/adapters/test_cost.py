"""Which terms the decode pass adds, and the memory of those that it cannot: against what the layers really keep."""

from __future__ import annotations

import families
import pytest
import torch
from safetensors.torch import save_file

from gossamer.adapters import attach, attached, detach, read_adapter
from gossamer.layers import Difference, LinearGroup, LowRank
from gossamer.models.flux import from_diffusers, prepare
from gossamer.models.swap import linear_layers, quantize

DECODED = [
    "LoKr, second factored",
    "LoKr, both factored",
    "LoKr, core",
    "LoHa",
    "LoHa, core",
]
MERGED = {
    "LoKr, whole": "LoKr",
    "LoKr, first factored": "LoKr",
    "LoKr, rank too large for the decode pass": "LoKr",
    "LoHa, rank too large for the decode pass": "LoHa",
    "difference": "weight differences",
    "DoRA of rows": "DoRA",
}
WHERE = "transformer_blocks.0.attn.to_q"


@pytest.fixture
def adapter_of(spec, tmp_path):
    def make(name, *linears):
        generator = torch.Generator().manual_seed(3)
        tensors = {}
        for linear, shape in linears or ((WHERE, (256, 256)),):
            made = families.FAMILIES[name].file(shape, generator)
            tensors |= {f"transformer.{linear}{ending}": value for ending, value in made.items()}
        save_file(tensors, tmp_path / "family.safetensors")
        return read_adapter(tmp_path / "family.safetensors", spec)

    return make


@pytest.fixture
def prepared(make_model):
    """Our transformer, whose linears run as groups."""

    def make(compute, storage="nf4"):
        model = from_diffusers(make_model())
        quantize(model, storage)
        prepare(model, compute)
        return model

    return make


def kept_bytes(model):
    """Bytes of the merged weights and their scales that groups and layers keep between calls."""
    products = [group._product for module in model.modules() for group in groups_of(module)]
    products += [layer._product for layer in linear_layers(model).values()]
    operands = [product._operand for product in products if product._operand is not None]
    merged = [operand for operand in operands if not operand.parts]
    tensors = [tensor for operand in merged for tensor in (operand.weight, operand.scale) if tensor is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def groups_of(module):
    return [value for value in vars(module).values() if isinstance(value, LinearGroup)]


@pytest.mark.parametrize("name", DECODED)
def test_families_that_the_decode_pass_adds(name, quantized, adapter_of):
    model = quantized()
    attach(model, adapter_of(name), "style")
    (term,) = linear_layers(model)[WHERE].adapters()
    assert type(term) is LowRank
    assert term.rank <= 64
    cost = attached(model)["style"].cost
    assert (cost.factor_bytes, cost.merged_bytes, cost.reason) == (term.nbytes, 0, "")


@torch.inference_mode()
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MERGED)
def test_the_cost_of_a_merged_copy(name, compute, prepared, adapter_of, paint):
    """One changed linear makes the whole group of q, k and v a merged copy."""
    model = prepared(compute)
    paint(model)
    assert kept_bytes(model) == 0
    attach(model, adapter_of(name), "style")
    paint(model)
    cost = attached(model)["style"].cost
    assert cost.merged_bytes == kept_bytes(model) == 3 * 256 * 256 * (4 if compute == "fp32" else 2)
    (term,) = linear_layers(model)[WHERE].adapters()
    assert cost.factor_bytes == term.nbytes
    assert cost.total_bytes == cost.factor_bytes + cost.merged_bytes
    assert cost.reason == f"{MERGED[name]}: 3 linears keep a merged copy of their weights."
    detach(model, "style")
    paint(model)
    assert kept_bytes(model) == 0


@torch.inference_mode()
def test_a_layer_that_is_a_product_of_its_own(prepared, adapter_of, paint):
    model = prepared("fp32")
    linears = ("single_transformer_blocks.0.proj_out", (256, 1280)), ("norm_out.linear", (512, 256))
    attach(model, adapter_of("difference", *linears), "style")
    paint(model)
    assert attached(model)["style"].cost.merged_bytes == kept_bytes(model) == 4 * (256 * 1280 + 512 * 256)


def test_without_kernels_nothing_is_kept(quantized, adapter_of):
    model = quantized()
    attach(model, adapter_of("difference"), "style")
    assert isinstance(next(linear_layers(model)[WHERE].adapters()), Difference)
    cost = attached(model)["style"].cost
    assert cost.merged_bytes == 0
    assert cost.reason == "weight differences: 1 linears are merged anew at every call."
