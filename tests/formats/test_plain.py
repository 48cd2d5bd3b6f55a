from __future__ import annotations

import pytest
import torch

from gossamer.errors import InvalidOptionError, UnsupportedShapeError
from gossamer.formats import pack, packed_bytes, plain, unpack

STORAGES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize(("storage", "dtype"), STORAGES.items())
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float64])
def test_values_are_the_rounded_weight(storage, dtype, source):
    weight = torch.randn(7, 13, dtype=torch.float64).to(source)
    packed = pack(weight, storage)
    assert torch.equal(packed.tensors["values"], weight.to(dtype))
    assert torch.equal(unpack(packed, torch.float32), weight.to(dtype).float())
    assert packed.nbytes == packed_bytes(storage, 7, 13)


def test_pack_copies_and_unpack_of_the_same_type_does_not():
    weight = torch.randn(4, 6)
    packed = pack(weight, "fp32")
    weight.zero_()
    assert packed.tensors["values"].abs().sum() > 0
    assert unpack(packed, torch.float32).data_ptr() == packed.tensors["values"].data_ptr()


def test_a_transposed_weight_is_stored_row_by_row():
    weight = torch.randn(6, 4).t()
    packed = pack(weight, "fp32")
    assert packed.tensors["values"].is_contiguous()
    assert torch.equal(unpack(packed, torch.float32), weight)


def test_a_weight_beyond_fp16_is_refused_and_fits_bf16():
    weight = torch.tensor([[1.0, 7e4]])
    with pytest.raises(InvalidOptionError, match="fp16"):
        pack(weight, "fp16")
    assert unpack(pack(weight, "bf16"), torch.float32)[0, 1] == pytest.approx(7e4, rel=2**-8)


@pytest.mark.parametrize("dtype", STORAGES.values())
def test_hold_keeps_the_very_tensor(dtype):
    weight = torch.randn(3, 5).to(dtype)
    held = plain.hold(weight)
    assert STORAGES[held.format] is dtype
    assert held.tensors["values"].data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (0, 4), (4, 0)])
def test_only_a_matrix_with_values_is_packed(shape):
    with pytest.raises(UnsupportedShapeError):
        pack(torch.zeros(shape), "fp32")


@pytest.mark.parametrize("weight", [torch.zeros(2, 2, dtype=torch.int8), torch.zeros(2, 2, device="meta")])
def test_integers_and_empty_shells_are_refused(weight):
    with pytest.raises(InvalidOptionError):
        pack(weight, "bf16")
