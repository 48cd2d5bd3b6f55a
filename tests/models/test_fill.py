"""Building a module from a stream: storage by pattern, tied weights, totality, and packing some rows at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer.errors import FileDamagedError, InvalidOptionError, UnknownStorageError
from gossamer.formats import pack, packing_names, unpack
from gossamer.layers import QuantLinear
from gossamer.models import fill as filling
from gossamer.models.fill import STORED, Target, fill

CPU = torch.device("cpu")


class Tied(nn.Module):
    """Two linears, a norm, and an embedding that goes by two names."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Embedding(6, 64)
        self.again = self.shared
        self.first = nn.Linear(64, 128)
        self.second = nn.Linear(20, 64, bias=False)
        self.norm = nn.LayerNorm(64)


def module():
    with torch.device("meta"):
        return Tied()


def values():
    torch.manual_seed(0)
    return {name: torch.randn(tensor.shape) for name, tensor in module().state_dict().items() if "again" not in name}


def target(storage, dtype=torch.float32):
    return Target(storage, dtype, CPU)


def test_patterns_decide_and_the_rest_stays_plain():
    given = values()
    given["first.weight"] = given["first.weight"].half()
    filled = module()
    report = fill(filled, given.items(), target({"first": STORED}), "here")
    assert report.packed == {"first": "fp16"}
    assert isinstance(filled.first, QuantLinear)
    assert type(filled.second) is nn.Linear
    assert torch.equal(filled.second.weight, given["second.weight"])
    assert torch.equal(filled.first.bias, given["first.bias"])
    assert filled.again.weight is filled.shared.weight
    assert not any(parameter.requires_grad for parameter in filled.parameters())
    assert not filled.training
    plain = sum(given[name].numel() for name in given)
    assert report.bytes_before == 4 * plain
    assert report.bytes_after == 4 * plain - 2 * given["first.weight"].numel()


def test_what_is_stored_as_wished_is_not_packed_again():
    given = values()
    packed = pack(given["first.weight"], "Q8_0")
    filled = module()
    fill(filled, (given | {"first.weight": packed}).items(), target({"*": "q8_0"}), "here")
    assert torch.equal(filled.first.packed.tensors["blocks"], packed.tensors["blocks"])
    assert filled.first.packed.tensors["blocks"].data_ptr() != packed.tensors["blocks"].data_ptr()


def test_a_width_that_does_not_fit_stays_as_stored():
    filled = module()
    report = fill(filled, values().items(), target({"*": "Q4_0"}), "here")
    assert report.packed == {"first": "Q4_0"}
    assert report.kept == {"second": "20 input features are not a multiple of 32, as Q4_0 needs"}
    assert filled.second.packed.format == "fp32"


def test_no_plain_tensor_is_a_view_of_what_was_given():
    given = values()
    filled = module()
    fill(filled, given.items(), target({"*": STORED}), "here")
    addresses = {tensor.untyped_storage().data_ptr() for tensor in given.values()}
    assert not addresses & {tensor.untyped_storage().data_ptr() for tensor in filled.state_dict().values()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"more": torch.zeros(2)}, "unexpected keys: more"),
        ({"norm.weight": torch.zeros(3)}, r"mismatched keys: norm.weight is \(3,\), \(64,\) was expected"),
        ({"norm.weight": torch.zeros(64, dtype=torch.int32)}, "torch.int32 for norm.weight"),
        ({"again.weight": torch.zeros(6, 64)}, "again.weight differs from shared.weight"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    with pytest.raises(FileDamagedError, match=words):
        fill(module(), (values() | change).items(), target({"*": "nf4"}), "here")


def test_what_is_missing_is_named():
    given = values()
    del given["second.weight"]
    with pytest.raises(FileDamagedError, match=r"missing keys: second.weight \(1 in all\)"):
        fill(module(), given.items(), target({"*": "nf4"}), "here")


def test_a_tied_weight_may_be_there_twice():
    given = values()
    fill(module(), (given | {"again.weight": given["shared.weight"]}).items(), target({}), "here")


def test_a_weight_of_a_type_that_nothing_holds():
    given = values()
    given["first.weight"] = given["first.weight"].double()
    with pytest.raises(InvalidOptionError, match=r"'first' in here is stored as torch\.float64"):
        fill(module(), given.items(), target({"*": STORED}), "here")


def test_an_unknown_storage_is_refused_before_anything_is_read():
    def stream():
        pytest.fail("the stream was read")
        yield

    with pytest.raises(UnknownStorageError):
        fill(module(), stream(), target({"*": "nf5"}), "here")


@pytest.mark.parametrize("storage", packing_names())
def test_packing_some_rows_at_a_time_makes_the_same_bytes(storage, monkeypatch):
    """The last part is shorter, and of an odd height."""
    torch.manual_seed(0)
    weight = torch.randn(64 * 3 + 5, 256)
    monkeypatch.setattr(filling, "VALUES_AT_A_TIME", 64 * 256)
    filled = nn.Sequential(nn.Linear(256, len(weight), bias=False, device="meta"))
    fill(filled, [("0.weight", weight.double().float())], target({"*": storage}), "here")
    expected, got = pack(weight, storage), filled[0].packed
    assert got.shape == expected.shape
    for role, tensor in expected.tensors.items():
        assert torch.equal(got.tensors[role].view(torch.uint8), tensor.view(torch.uint8)), role


def test_packed_weights_are_packed_anew_from_what_they_stand_for():
    given = values()
    packed = pack(given["first.weight"], "nf4-dq")
    filled = module()
    fill(filled, (given | {"first.weight": packed}).items(), target({"first": "int8"}), "here")
    expected = pack(unpack(packed, torch.float32), "int8")
    assert torch.equal(filled.first.packed.tensors["codes"], expected.tensors["codes"])
