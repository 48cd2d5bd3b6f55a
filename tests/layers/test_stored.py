from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer.formats import pack, unpack
from gossamer.layers import StoredWeight


def bytes_of(packed):
    return {role: tensor.contiguous().view(torch.uint8).clone() for role, tensor in packed.tensors.items()}


def same_bytes(packed, before):
    return packed.tensors.keys() == before.keys() and all(
        torch.equal(tensor.contiguous().view(torch.uint8), before[role]) for role, tensor in packed.tensors.items()
    )


@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.to(torch.bfloat16),
        lambda module: module.half(),
        lambda module: module.double(),
        lambda module: module.float(),
        lambda module: module.to("cpu", torch.float16),
        lambda module: module.type(torch.float16),
    ],
    ids=["to", "half", "double", "float", "to-device-and-type", "type"],
)
def test_no_cast_reaches_the_bytes(storage, cast):
    stored = StoredWeight(pack(torch.randn(6, 256), storage))
    before, types = bytes_of(stored.packed), {role: tensor.dtype for role, tensor in stored.packed.tensors.items()}
    cast(nn.Sequential(stored))
    assert same_bytes(stored.packed, before)
    assert {role: tensor.dtype for role, tensor in stored.packed.tensors.items()} == types


def test_a_move_to_another_device_is_followed(storage):
    stored = StoredWeight(pack(torch.randn(6, 256), storage)).to("meta")
    assert all(tensor.is_meta for tensor in stored.packed.tensors.values())


def test_state_dict_round_trip(storage):
    source = StoredWeight(pack(torch.randn(6, 256), storage))
    target = StoredWeight(pack(torch.zeros(6, 256), storage))
    target.load_state_dict(source.state_dict())
    assert same_bytes(target.packed, bytes_of(source.packed))
    assert torch.equal(target.unpack(torch.float32), unpack(source.packed, torch.float32))


def test_a_state_of_another_format_does_not_load():
    source = StoredWeight(pack(torch.randn(6, 64), "nf4"))
    target = StoredWeight(pack(torch.randn(6, 64), "fp4"))
    with pytest.raises(RuntimeError, match="nf4_codes"):
        target.load_state_dict(source.state_dict())


def test_shared_memory_is_noticed():
    plain = StoredWeight(pack(torch.randn(6, 64), "bf16"))
    assert plain.shares_memory(plain.unpack(torch.bfloat16))
    assert not plain.shares_memory(plain.unpack(torch.float32))
