"""Files as private memory: read when a byte is looked at, never written back; and copies that do not depend on them.

map_file(path)          the whole file, mapped
bytes_of(mapping)       the same as a uint8 tensor, of which tensors of a file are views
prefetch(mapping, ...)  have a range read that will be looked at soon
release(mapping, ...)   forget the pages of a range that was copied elsewhere
own_copy(tensor)        the same values in memory of our own, at the speed of the memory
trim_heap()             give freed memory back to the system
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from functools import cache
from pathlib import Path

import torch

from gossamer.errors import FileMissingError

LARGE_BYTES = 256 << 10


def map_file(path: Path) -> mmap.mmap:
    """The whole file; it has to hold at least one byte."""
    try:
        with path.open("rb") as file:
            if sys.platform == "linux":
                # without a reservation a file larger than the memory can be mapped, as only changed pages take memory
                return mmap.mmap(
                    file.fileno(),
                    os.fstat(file.fileno()).st_size,
                    flags=mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0),  # known to Python from 3.13 on
                    prot=mmap.PROT_READ | mmap.PROT_WRITE,
                )
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise FileMissingError(
            f"{str(path)!r} cannot be mapped into memory.",
            f"The system says: {error}.",
            "Copy the file to a local disk and check that it is not being written to.",
        ) from error


def bytes_of(mapping: mmap.mmap) -> torch.Tensor:
    """The mapped bytes, uint8; the tensor, and each view of it, keeps the mapping alive."""
    return torch.frombuffer(mapping, dtype=torch.uint8)


def prefetch(mapping: mmap.mmap, start: int, stop: int) -> None:
    """Ask the system to read a range into its page cache, without waiting for it."""
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    if stop > first and sys.platform == "linux":
        mapping.madvise(mmap.MADV_WILLNEED, first, stop - first)


def release(mapping: mmap.mmap, start: int, stop: int) -> None:
    """Take the pages of a range out of this process; looking at them again reads the file again.

    What was written into them since is lost. Where the system cannot do this, nothing happens.
    """
    # whole pages only: the first and the last may hold a neighbour
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    length = stop // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0 and sys.platform == "linux":
        mapping.madvise(mmap.MADV_DONTNEED, first, length)


def own_copy(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a CPU tensor in contiguous memory of our own.

    Large ones get a mapping of their own. It may have huge pages: filling it then takes a fault every 2 MB instead of
    every 4 kB, which from a mapped file in the page cache made 11 GB/s of 2.9 (one core, Linux 6.18). And what is kept
    does not lie between what is freed.
    """
    size = tensor.numel() * tensor.element_size()
    if size < LARGE_BYTES or sys.platform != "linux":
        return tensor.clone(memory_format=torch.contiguous_format)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return bytes_of(memory).view(tensor.dtype).view(tensor.shape).copy_(tensor)


def trim_heap() -> None:
    """Give freed memory back to the system, wherever on the heap it is; nothing happens where the C library cannot.

    By itself glibc gives back the end of its heap alone. Small tensors that stay behind large ones that go then pin
    holes: packing 199 MB of bf16 into int8 left 120 MB of them.
    """
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@cache
def _c_library() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
