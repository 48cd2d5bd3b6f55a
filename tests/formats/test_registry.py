from __future__ import annotations

import pytest
import torch

from gossamer.errors import GossamerError, InvalidOptionError, UnknownStorageError, UnsupportedShapeError
from gossamer.formats import Format, find_format, pack, packed_bytes, packing_names, storage_names, unpack
from gossamer.formats.registry import FORMATS

BASE = ("fp32", "fp16", "bf16", "fp8", "fp8_e5m2", "int8", "nf4", "fp4", "nf4-dq", "fp4-dq")
GGUF = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
PACKABLE = BASE + GGUF


def test_names_are_there_and_unique_whatever_their_case():
    assert set(PACKABLE) <= set(storage_names())
    assert len({name.lower() for name in storage_names()}) == len(storage_names()) == len(FORMATS)


@pytest.mark.parametrize("name", storage_names())
def test_case_does_not_matter(name):
    found = find_format(name.swapcase())
    assert isinstance(found, Format)
    assert found.name == name


@pytest.mark.parametrize(
    ("wrong", "meant"), [("nf5", "nf4"), ("q4k", "Q4_K"), ("float8_e5m2", "fp8_e5m2"), ("BF-16", "bf16")]
)
def test_an_unknown_name_lists_all_and_the_closest(wrong, meant):
    with pytest.raises(UnknownStorageError) as caught:
        find_format(wrong)
    assert repr(wrong) in caught.value.what
    assert all(name in caught.value.why for name in storage_names())
    assert meant in caught.value.next_step


def test_pack_and_bytes_refuse_an_unknown_name():
    for call in (lambda: pack(torch.zeros(2, 2), "nf5"), lambda: packed_bytes("nf5", 2, 2)):
        with pytest.raises(UnknownStorageError):
            call()


def test_an_unknown_name_with_nothing_close():
    with pytest.raises(UnknownStorageError, match="Choose one"):
        find_format("zzzzzzzz")


@pytest.mark.parametrize("storage", PACKABLE)
def test_packed_bytes_are_the_real_bytes(storage):
    packed = pack(torch.randn(5, 512) * 0.02, storage)
    assert packed.format == storage
    assert packed.shape == (5, 512)
    assert packed.nbytes == packed_bytes(storage, 5, 512)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        decoded = unpack(packed, dtype)
        assert decoded.dtype == dtype
        assert torch.equal(decoded, unpack(packed, torch.float32).to(dtype))


@pytest.mark.parametrize("storage", PACKABLE)
def test_pack_leaves_the_weight_alone_and_unpack_the_bytes(storage):
    weight = torch.randn(3, 256)
    before = weight.clone()
    packed = pack(weight, storage)
    kept = {role: tensor.clone() for role, tensor in packed.tensors.items()}
    unpack(packed, torch.bfloat16)
    assert torch.equal(weight, before)
    assert all(
        torch.equal(tensor.view(torch.uint8), kept[role].view(torch.uint8)) for role, tensor in packed.tensors.items()
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("storage", PACKABLE)
def test_no_format_packs_values_that_are_not_finite(storage, bad):
    weight = torch.randn(4, 256)
    weight[2, 7] = bad
    with pytest.raises(InvalidOptionError) as caught:
        pack(weight, storage)
    assert caught.value.why
    assert caught.value.next_step


def test_a_width_that_blocks_do_not_divide():
    chosen = next(known for known in FORMATS if known.width_multiple == 256)
    for call in (lambda: pack(torch.zeros(2, 100), chosen.name), lambda: packed_bytes(chosen.name, 2, 100)):
        with pytest.raises(UnsupportedShapeError, match="256"):
            call()


@pytest.mark.parametrize("storage", sorted(set(storage_names()) - set(PACKABLE)))
def test_every_other_format_packs_or_says_why_not(storage):
    weight = torch.randn(2, 256) * 0.02
    try:
        packed = pack(weight, storage)
    except GossamerError as error:
        refusal = error
    else:
        assert packed.nbytes == packed_bytes(storage, 2, 256)
        assert unpack(packed, torch.float32).shape == (2, 256)
        return
    assert storage in str(refusal)
    assert refusal.next_step


@pytest.mark.parametrize("name", [name for name in storage_names() if name not in packing_names()])
def test_a_format_that_is_only_read_is_refused_for_packing_with_the_ones_that_pack(name):
    with pytest.raises(UnknownStorageError) as caught:
        pack(torch.zeros(1, 256), name)
    assert all(other in caught.value.next_step for other in packing_names())
    assert find_format(name).name == name


def test_every_format_that_packs_does():
    assert all(pack(torch.ones(1, 256), name).shape == (1, 256) for name in packing_names())
