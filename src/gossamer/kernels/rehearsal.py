"""Machine code for many kernels side by side, before the first of them is needed.

A kernel is compiled, and its code loaded, at its first launch: one after the other, up to 4 s each on a slow host. In a
rehearsal every `Launch` only hands its kernel to Triton's compiler, which works in threads: most of its passes, and the
programs that it calls, hold no lock of Python's.

Everything else in a rehearsal happens: products, other kernels, and launches whose code is there. So what is rehearsed
has to write into tensors of its own, and what comes out means nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from threading import Thread
from typing import Any

import torch


class Asked:
    """The machine code that a rehearsal asked for, once each."""

    def __init__(self) -> None:
        self._coming: dict[int, Any] = {}  # Triton stands for equal code by one object

    def ask(self, kernel: Any, grid: tuple[int, int, int], *arguments: object, **options: object) -> None:
        """Have the code of `kernel[grid](*arguments, **options)` made, without waiting for it or running it."""
        coming = kernel.warmup(*arguments, grid=grid, **options)
        if coming is not None:  # Triton's interpreter makes no code
            self._coming[id(coming)] = coming

    @property
    def coming(self) -> list[Any]:
        """What Triton handed back."""
        return list(self._coming.values())


_under_way: ContextVar[Asked | None] = ContextVar("gossamer_rehearsal", default=None)


def under_way() -> Asked | None:
    """The rehearsal that the caller is part of."""
    return _under_way.get()


def rehearse(work: Callable[[], object], device: torch.device) -> None:
    """Run `work` as a rehearsal; back when what it asked for is on the device. Raises what compiling raises."""
    # an interrupted wait leaves Triton's mode on: it goes with the context
    copy_context().run(_rehearse, work, device)


def _rehearse(work: Callable[[], object], device: torch.device) -> None:
    from triton import AsyncCompileMode

    asked = Asked()
    _under_way.set(asked)
    with ThreadPoolExecutor(thread_name_prefix="gossamer-compile") as pool, AsyncCompileMode(pool):
        work()
        # queued behind all compilations, so that none of them lacks a thread because of those that wait for it
        for loading in [pool.submit(_load, coming, device) for coming in asked.coming]:
            loading.result()


def _load(coming: Any, device: torch.device) -> None:
    """Bring machine code onto the device, with what launches it, once it is compiled."""
    compiled = coming.result() if hasattr(coming, "result") else coming
    with torch.cuda.device(device.index if device.type == "cuda" else -1):
        compiled[1, 1, 1]


@contextmanager
def hashed_meanwhile() -> Iterator[None]:
    """Inside, Triton hashes its own 400 MB in a thread, which the first kernel of a process would wait for."""
    from triton.runtime.cache import triton_key

    hashing = Thread(target=triton_key, name="gossamer-hash")
    hashing.start()
    try:
        yield
    finally:
        hashing.join()
