"""The memory of the device that a pipeline runs on: what is free, what was taken at most, a cap, and running out of it.

Everything here is of this process' allocator and of one device. A device that is no GPU has no such memory: nothing is
capped there, and nothing is counted.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# How running out of device memory is told by what is no allocator of torch: CUDA itself, cuBLAS, cuDNN, Triton. A
# cuBLAS handle that cannot be created is told as not initialised; memory is what it lacks then.
SIGNS = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cudaErrorMemoryAllocation",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception, or one that it was raised from or after, means that the device has too little memory."""
    cause: BaseException | None = error
    while cause is not None:
        told = isinstance(cause, RuntimeError) and any(sign in str(cause) for sign in SIGNS)
        if told or isinstance(cause, torch.OutOfMemoryError):
            return True
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return False


@contextmanager
def capped(device: torch.device, limit: int | None) -> Iterator[None]:
    """Inside, this process' allocator takes no more than `limit` bytes of the device; None is no limit.

    Its segments may grow meanwhile, which leaves half the gaps between tensors. What was there before holds again
    afterwards.
    """
    if device.type != "cuda" or limit is None:
        yield
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    before = torch.cuda.get_per_process_memory_fraction(index)
    torch.cuda.empty_cache()  # what earlier work left in the cache counts
    total = int(torch.cuda.get_device_properties(index).total_memory)
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), index)
    try:
        with _growing_segments():
            yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, index)


@contextmanager
def _growing_segments() -> Iterator[None]:
    """Inside, new segments of the allocator may grow; torch has no public name for this."""
    grew = torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"]
    if grew:
        yield
        return
    _set_allocator("expandable_segments:True")
    try:
        yield
    finally:
        _set_allocator("expandable_segments:False")


def _set_allocator(setting: str) -> None:
    """What `PYTORCH_ALLOC_CONF` sets, from now on; torch renamed it."""
    renamed = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (renamed or torch.cuda.memory._set_allocator_settings)(setting)


def unused_bytes(device: torch.device) -> int | None:
    """What this process can have beside its tensors: free memory, and its cache. None where nobody counts."""
    free = free_bytes(device)
    return None if free is None else free - torch.cuda.memory_allocated(device)


def free_bytes(device: torch.device) -> int | None:
    """What this process could have if it gave up all it has: free memory, and its own. None where nobody counts."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def release(device: torch.device) -> None:
    """Give back what is held by nothing but cycles and caches."""
    gc.collect()
    empty_cache(device)


def empty_cache(device: torch.device) -> None:
    """Give back what the allocator keeps for later, pools of graphs that are gone among it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    """Begin to count the peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Most that tensors took at once since the count began, and captured graphs beside them; None where nobody counts.

    The memory of a graph is nobody else's between two replays, though no tensor has it then.
    """
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) + _idle_in_graphs(device)


def _idle_in_graphs(device: torch.device) -> int:
    """Of the pools that captured graphs have, what no tensor has now."""
    index = torch.cuda.current_device() if device.index is None else device.index
    segments = [each for each in torch.cuda.memory_snapshot() if each["device"] == index]
    return sum(
        int(each["total_size"]) - int(each["allocated_size"]) for each in segments if each["segment_pool_id"] != (0, 0)
    )
