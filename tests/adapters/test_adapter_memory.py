"""How an adapter lies in host memory: the same values in few buffers, which few copies bring to a model's device."""

from __future__ import annotations

import pytest
import torch

from failing_copies import fail_after
from gossamer.adapters import Adapter, DecomposedTerm, LowRankTerm, attach, attached, detach, host_memory
from gossamer.adapters.host_memory import pinned_bytes, ready_for, side_by_side
from gossamer.adapters.terms import tensors_of
from gossamer.layers import moves
from gossamer.models.swap import linear_layers

TEXT = "text_model.encoder.layers.0.mlp.fc1"


class Buffers(list):
    """Plain memory, and all that was made of it."""

    def __call__(self, count):
        self.append(torch.empty(count, dtype=torch.uint8))
        return self[-1]


def storages(tensors):
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def all_tensors(adapter):
    return [
        tensor
        for terms in (adapter.terms, *adapter.text.values())
        for term in terms.values()
        for tensor in tensors_of(term)
    ]


@pytest.fixture
def copies(monkeypatch):
    """Sizes of the runs that are copied to another device."""
    counted, copied = [], moves._copied

    def counting(run, device):
        counted.append(len(run))
        return copied(run, device)

    monkeypatch.setattr(moves, "_copied", counting)
    return counted


def test_values_types_and_shapes_stay(spec, make_adapter):
    plain = make_adapter(bias=True, norms=True)
    text = {"text_encoder": {TEXT: LowRankTerm(torch.randn(2, 768).half(), torch.randn(3072, 2).half(), 0.5)}}
    adapter = Adapter(spec, plain.terms, plain.replacements, text=text)
    found = side_by_side(adapter, Buffers())
    assert found.terms.keys() == adapter.terms.keys()
    for one, other in zip(all_tensors(found), all_tensors(adapter), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()
    assert found.text["text_encoder"][TEXT].multiplier == 0.5
    assert found.replacements is adapter.replacements


def test_factors_lie_in_one_buffer_and_biases_in_another(make_adapter):
    buffers = Buffers()
    found = side_by_side(make_adapter(bias=True), buffers)
    factors = [factor for term in found.terms.values() for factor in (term.down, term.up)]
    biases = [term.bias for term in found.terms.values()]
    assert len(buffers) == len(storages(factors)) + len(storages(biases)) == 2
    assert len(moves.runs(factors)) == 1
    assert all(
        tensor.data_ptr() % host_memory.ALIGNMENT == buffers[0].data_ptr() % host_memory.ALIGNMENT for tensor in factors
    )


def test_buffers_have_a_size(make_adapter, monkeypatch):
    monkeypatch.setattr(host_memory, "BUFFER_BYTES", 1 << 16)
    buffers = Buffers()
    found = side_by_side(make_adapter(), buffers)
    assert len(buffers) > 3
    assert max(len(buffer) for buffer in buffers) <= 1 << 16
    assert len(moves.runs(all_tensors(found))) == len(buffers)


def test_what_parts_of_a_fused_module_share_is_there_once(spec, make_adapter):
    down = torch.randn(4, 256)
    names = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    adapter = Adapter(spec, {name: LowRankTerm(down, torch.randn(256, 4)) for name in names})
    found = side_by_side(adapter, Buffers())
    assert len({term.down.data_ptr() for term in found.terms.values()}) == 1


def test_other_kinds_and_large_tensors(spec, monkeypatch):
    monkeypatch.setattr(host_memory, "LARGEST_BYTES", 4 * 256 * 4)
    inner = LowRankTerm(torch.randn(4, 256), torch.randn(256, 5)[:, :4])
    large = LowRankTerm(torch.randn(8, 256), torch.randn(256, 8))
    names = [f"transformer_blocks.0.attn.to_{part}" for part in "qk"]
    adapter = Adapter(spec, dict(zip(names, (DecomposedTerm(inner, torch.ones(256, 1)), large), strict=True)))
    first, second = side_by_side(adapter, Buffers()).terms.values()
    assert second.down is large.down, "what is larger stays"
    assert torch.equal(first.inner.up, inner.up)
    assert len(storages(tensors_of(first))) == 1


def test_nothing_is_done_for_a_cpu(make_adapter):
    adapter = make_adapter()
    assert ready_for(adapter, "cpu") is adapter


def test_a_system_that_pins_no_more(monkeypatch):
    empty = torch.empty

    def refusing(*sizes, pin_memory=False, **options):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*sizes, **options)

    monkeypatch.setattr(torch, "empty", refusing)
    with pytest.warns(UserWarning, match="could not be put into pinned memory: CUDA error"):
        memory = pinned_bytes(100)
    assert memory.shape == (100,)


# attaching ------------------------------------------------------------------------------------------------------------


def test_attaching_takes_one_copy_a_buffer(quantized, make_adapter, copies):
    model = quantized().to("meta")
    adapter = side_by_side(make_adapter(bias=True), Buffers())
    attach(model, adapter, "style")
    assert sorted(copies) == [len(adapter.terms), 2 * len(adapter.terms)], "biases, factors"
    detach(model, "style")
    attach(model, make_adapter(), "separate")
    assert copies[2:] == [1] * 2 * len(adapter.terms)
    for layer in linear_layers(model).values():
        assert all(tensor.device.type == "meta" for term in layer.adapters() for tensor in term.tensors())


def test_the_effect_is_the_same(quantized, make_adapter, paint):
    first, second = quantized(), quantized()
    adapter = make_adapter(bias=True)
    attach(first, adapter, "style", 0.7)
    attach(second, side_by_side(adapter, Buffers()), "style", 0.7)
    assert torch.equal(paint(first), paint(second))


def test_memory_that_runs_out_leaves_the_model_as_it_was(quantized, make_adapter, control, monkeypatch):
    model = quantized().to("meta")
    attach(model, make_adapter(), "style")
    names = {name: layer.names() for name, layer in linear_layers(model).items()}
    width, left = model.config.in_channels, fail_after(monkeypatch, 1)
    with pytest.raises(torch.OutOfMemoryError):
        attach(model, side_by_side(control, Buffers()), "control")
    assert not left, "the first of two copies was made"
    assert list(attached(model)) == ["style"]
    assert model.config.in_channels == width
    assert {name: layer.names() for name, layer in linear_layers(model).items()} == names


@pytest.mark.gpu
def test_on_a_gpu(quantized, make_adapter, paint):
    adapter = make_adapter(bias=True)
    ready = ready_for(adapter, "cuda")
    assert all(tensor.is_pinned() for tensor in all_tensors(ready))
    for one, other in zip(all_tensors(ready), all_tensors(adapter), strict=True):
        assert torch.equal(one, other)
    model = quantized().to("cuda")
    attach(model, ready, "style", 0.7)
    del ready  # the copies may still run
    for name, layer in linear_layers(model).items():
        (term,) = layer.adapters()
        assert torch.equal(term.up.cpu(), adapter.terms[name].up)
        assert torch.equal(term.down.cpu(), adapter.terms[name].down)
