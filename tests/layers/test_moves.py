"""Moving terms: as few copies as memory allows, the same values, and nothing changed where a copy fails."""

from __future__ import annotations

import pytest
import torch

from failing_copies import fail_after
from gossamer.layers import Decomposed, LowRank
from gossamer.layers.moves import GAP_BYTES, RUN_BYTES, move_terms, moved, runs

META = torch.device("meta")


def views_of(buffer, *shapes, gap=0):
    """Matrices side by side in a buffer, `gap` values between them."""
    found, stop = [], 0
    for shape in shapes:
        start, stop = stop, stop + shape[0] * shape[1]
        found.append(buffer[start:stop].view(shape))
        stop += gap
    return found


@pytest.fixture
def copies(monkeypatch):
    """Bytes of every copy to another device; a clone stands in for the copy, as there is one device only."""
    counted = []

    def to(tensor, device, non_blocking=False):
        counted.append(tensor.nbytes)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "to", to)
    return counted


def test_what_lies_side_by_side_is_one_copy_of_equal_values(copies):
    tensors = views_of(torch.randn(1000, dtype=torch.float64), (4, 16), (32, 4), (4, 20), gap=GAP_BYTES // 8)
    shuffled = [tensors[2], tensors[0], tensors[1], tensors[0][1:3]]  # a view of one of them lies in it
    found = moved(shuffled, META)
    assert len(copies) == 1
    for one, other in zip(found, shuffled, strict=True):
        assert torch.equal(one, other)
        assert one.shape == other.shape
        assert one.data_ptr() != other.data_ptr()
    assert len({one.untyped_storage().data_ptr() for one in found}) == 1


def test_bytes_between_tensors_are_not_copied(copies):
    first, second = views_of(torch.randn(100_000), (4, 16), (32, 4), gap=GAP_BYTES // 4 + 1)
    found = moved([first, second], META)
    assert copies == [first.nbytes, second.nbytes]
    assert torch.equal(found[1], second)
    assert found[1].untyped_storage().nbytes() == second.nbytes


def test_separate_and_scattered_tensors_are_copied_alone(copies):
    column = torch.randn(8, 8)[:, :2]
    tensors = [torch.randn(4, 4), torch.randn(4, 4), column, torch.randn(0, 4)]
    found = moved(tensors, META)
    assert len(copies) == 4
    assert all(torch.equal(one, other) for one, other in zip(found, tensors, strict=True))


def test_types_are_not_mixed_in_a_run():
    buffer = torch.zeros(256, dtype=torch.uint8)
    assert runs([buffer[:128].view(torch.float32), buffer[128:].view(torch.bfloat16)]) == [[0], [1]]


def test_a_run_has_an_end():
    tensors = views_of(torch.empty(4 * RUN_BYTES, dtype=torch.uint8), *[(16, RUN_BYTES // 32)] * 6)
    assert runs(tensors) == [[0, 1], [2, 3], [4, 5]]


def test_a_tensor_longer_than_a_run_is_whole():
    assert runs(views_of(torch.empty(3 * RUN_BYTES, dtype=torch.uint8), (1, 2 * RUN_BYTES), (1, 8))) == [[0], [1]]


def test_every_tensor_of_every_kind_is_moved():
    inner = LowRank("a", torch.randn(2, 8), torch.randn(4, 2))
    outer = Decomposed("a", inner, torch.randn(4, 1), bias=torch.randn(4))
    plain = LowRank("b", torch.randn(2, 8), torch.randn(4, 2), bias=torch.randn(4))
    assert len(outer.tensors()) == 4
    move_terms([(outer, META), (plain, META)])
    assert {tensor.device for term in (outer, plain) for tensor in term.tensors()} == {META}


def test_a_copy_that_fails_changes_no_term(monkeypatch):
    terms = [LowRank(name, torch.randn(2, 8), torch.randn(4, 2)) for name in "abc"]
    before = [term.tensors() for term in terms]
    fail_after(monkeypatch, 3)
    with pytest.raises(torch.OutOfMemoryError):
        move_terms([(term, META) for term in terms])
    for term, tensors in zip(terms, before, strict=True):
        assert all(one is other for one, other in zip(term.tensors(), tensors, strict=True))
