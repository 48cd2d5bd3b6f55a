"""Host memory that copies to a GPU start from: how much there is, and how it is pinned.

Pinned memory is mapped and registered by ourselves, page by page, because torch's own allocator rounds a request up to
the next power of two: a block of 135 MB would take 268.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import torch

from gossamer.errors import InvalidOptionError

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


class _PinnedMapping(mmap.mmap):
    """Anonymous pages that a GPU reads directly, for as long as anything looks at them."""

    unregister: Any = None

    def __del__(self) -> None:
        if self.unregister is not None:
            self.unregister()


def host_bytes(count: int, pinned_for: torch.device | None = None) -> torch.Tensor:
    """Unwritten host memory, uint8 (count,), pinned where it is for a CUDA device."""
    if pinned_for is None or pinned_for.type != "cuda" or count == 0:
        return torch.empty(count, dtype=torch.uint8)
    mapping = _PinnedMapping(-1, count)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)  # a fault, and an entry for the GPU, every 2 MB instead of every 4 kB
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    address, cudart = memory.data_ptr(), torch.cuda.cudart()
    with torch.cuda.device(pinned_for):
        code = int(cudart.cudaHostRegister(address, count, 0))
    if code != 0:
        raise InvalidOptionError(
            f"The system does not pin {count / 1e9:.2f} GB of host memory.",
            f"CUDA answers {cudart.cudaGetErrorString(cudart.cudaError(code))}; systems limit how much may be pinned.",
            "Use a placement without pinned memory (pinned=False), or one with more resident blocks.",
        )
    mapping.unregister = lambda: cudart.cudaHostUnregister(address)
    return memory


def available_host_bytes() -> int | None:
    """What this process may still take without swapping; None where the system does not say."""
    free = [number for number in (_meminfo(), _cgroup()) if number is not None]
    return min(free, default=None)


def require_host_bytes(needed: int, purpose: str) -> None:
    """Refuse what would not fit, before any of it is taken."""
    free = available_host_bytes()
    if free is not None and needed > free:
        raise InvalidOptionError(
            f"There is not enough host memory for {purpose}.",
            f"It takes {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are available.",
            "Close other programs, choose a smaller storage format, keep more blocks on the GPU, or leave the weights "
            "in their file (pinned=False).",
        )


def _meminfo() -> int | None:
    """MemAvailable: free memory and what the system can give back at once."""
    if not MEMINFO.exists():
        return None
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines() if ":" in line)
    return int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None


def _cgroup() -> int | None:
    """What a container's limit leaves, its page cache counted as free."""
    limit, used, stat = (CGROUP / name for name in ("memory.max", "memory.current", "memory.stat"))
    if not limit.exists() or not used.exists() or limit.read_text().strip() == "max":
        return None
    entries = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
    return int(limit.read_text()) - int(used.read_text()) + int(entries.get("file", 0))
