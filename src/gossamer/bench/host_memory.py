"""Host memory of this process as Linux counts it, by kind, now and at most.

    resident    all of it                                         VmRSS, VmHWM
    anonymous   the heap, and what was mapped without a file      RssAnon
    shared      pinned memory among it: see memory/offload_host   RssShmem
    file        pages of mapped files, libraries among them       RssFile

Pages of a mapped file are the page cache's: they count here while they are mapped and were looked at, and the system
takes them back when it needs them. Nothing else is given back under pressure but to swap.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
KEYS = ("VmRSS", "RssAnon", "RssShmem", "RssFile")
SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class HostMemory:
    """Bytes of each kind. In peaks each is the most of its own kind, and they need not have been at the same time."""

    resident: int
    anonymous: int
    shared: int
    file: int
    owned: int  # anonymous and shared together

    def or_more(self, other: HostMemory) -> HostMemory:
        """The larger of each."""
        mine, others = asdict(self), asdict(other)
        return HostMemory(**{kind: max(mine[kind], others[kind]) for kind in mine})


def host_memory() -> HostMemory | None:
    """As it is now; None where the system does not say."""
    lines = _status()
    if lines is None or not lines.keys() >= set(KEYS):
        return None
    resident, anonymous, shared, file = (lines[key] for key in KEYS)
    return HostMemory(resident, anonymous, shared, file, anonymous + shared)


def peak_resident_bytes() -> int | None:
    """Most that was resident since the process began, or since `begin_peak`; None where the system does not say."""
    lines = _status()
    return None if lines is None else lines.get("VmHWM")


def begin_peak() -> None:
    """Have the system count the most that is resident from now on."""
    CLEAR.write_text("5", "ascii")


class Watch:
    """What `watched` saw: the most of each kind, as far as samples meet it; None where the system does not say."""

    def __init__(self) -> None:
        self.most = host_memory()

    def look(self) -> None:
        """Take a sample."""
        now = host_memory()
        self.most = now if self.most is None or now is None else self.most.or_more(now)


@contextmanager
def watched() -> Iterator[Watch]:
    """Inside, a thread takes samples."""
    watch, done = Watch(), Event()

    def work() -> None:
        while not done.wait(SAMPLE_SECONDS):
            watch.look()

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        done.set()
        thread.join()
        watch.look()


def _status() -> dict[str, int] | None:
    """Amounts of memory in bytes, by the names that Linux has for them."""
    if not STATUS.exists():
        return None
    words = [line.split() for line in STATUS.read_text("ascii").splitlines()]
    return {each[0].removesuffix(":"): int(each[1]) * 1024 for each in words if each[-1:] == ["kB"]}
