"""Staged copies: read by a thread through a ring of small buffers, each free again before it is written again."""

from __future__ import annotations

import threading

import pytest
import torch

from gossamer.errors import FileMissingError
from gossamer.memory.offload_copier import HostCopier
from gossamer.memory.offload_feed import RING_BUFFERS, StagedFeed
from gossamer.memory.offload_home import MemoryPiece, Scattered

CPU = torch.device("cpu")


def scattered(count, gap=0):
    """Two runs of bytes with a gap between them, and what they look like together."""
    values = torch.arange(count, dtype=torch.int64).remainder(251).to(torch.uint8)
    half = count // 2
    pieces = (MemoryPiece(0, values[:half]), MemoryPiece(half + gap, values[half:]))
    whole = torch.cat((values[:half], torch.zeros(gap, dtype=torch.uint8), values[half:]))
    return Scattered(pieces, count + gap), whole


class LateCopier(HostCopier):
    """Copies only when somebody waits for them, as a busy bus would, and notes what it is asked."""

    def __init__(self):
        self.left = []
        self.threads = set()

    def copy(self, source, target, after=()):
        self.threads.add(threading.current_thread().name)
        mark = object()
        self.left.append((mark, lambda: target.copy_(source)))
        return mark

    def wait(self, mark):
        while any(mark is other for other, _ in self.left):
            self.left.pop(0)[1]()

    hold = wait


@pytest.mark.parametrize("count", [1, 64, 100, 1000])
@pytest.mark.parametrize("gap", [0, 56, 300])
@pytest.mark.parametrize("copier", [HostCopier, LateCopier])
def test_all_bytes_arrive(count, gap, copier):
    home, whole = scattered(count, gap)
    feed = StagedFeed(copier(), CPU, buffer_bytes=64)
    for _ in range(2):
        target = torch.zeros(count + gap, dtype=torch.uint8)
        feed.start(home, target, ()).hold()
        outside = torch.ones(count + gap, dtype=torch.bool)
        outside[count // 2 : count // 2 + gap] = False
        assert torch.equal(target[outside], whole[outside])
    feed.close()


def test_a_buffer_is_not_written_before_its_copy_is_done():
    """With a copier that forgets to wait, the late copies all read what was written last."""

    class Forgetful(LateCopier):
        def wait(self, mark):
            pass

    home, whole = scattered(64 * (RING_BUFFERS + 1))
    target = torch.zeros_like(whole)
    copier = Forgetful()
    feed = StagedFeed(copier, CPU, buffer_bytes=64)
    arrival = feed.start(home, target, ())
    arrival.end.result()
    for _, copy in copier.left:
        copy()
    assert not torch.equal(target, whole)
    feed.close()


def test_reading_happens_beside_the_caller():
    copier = LateCopier()
    feed = StagedFeed(copier, CPU, buffer_bytes=64)
    home, whole = scattered(100)
    feed.start(home, torch.zeros_like(whole), ()).hold()
    assert copier.threads == {"gossamer-reader_0"}
    feed.close()


def test_an_error_of_reading_is_raised_where_the_bytes_are_needed():
    class Gone:
        offset, nbytes = 0, 100

        def read(self, start, into):
            raise FileMissingError("gone", "why", "next")

    feed = StagedFeed(HostCopier(), CPU, buffer_bytes=64)
    arrival = feed.start(Scattered((Gone(),), 100), torch.zeros(100, dtype=torch.uint8), ())
    with pytest.raises(FileMissingError):
        arrival.hold()
    feed.close()
