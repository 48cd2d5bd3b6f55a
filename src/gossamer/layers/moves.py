"""Takes the tensors of terms to a device, as few copies as their places in memory allow.

A full set of adapters is a thousand small tensors, and each copy costs the host more than the bytes do. So what lies
side by side in one storage, as `adapters.host_memory` lays it out, is copied as one run, and the tensors become views
of it at the same distances. Tensors that lie alone are copied alone; bytes between tensors are never copied, but for a
gap that only aligns.

    storage    [down 0][gap][down 1][gap][up 0] ... other bytes ... [bias]
    copies     (---------- one run ----------)                      (-----)

A run is free only when none of its tensors is left, so it has RUN_BYTES at the most: stacks (see `stacks`) take the
factors over kind by kind, and then give back what they were copied from, as they lie kind by kind there too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from gossamer.layers.term import Term

RUN_BYTES = 4 << 20  # 45 runs for rank 16 of FLUX.1; at 55 GB/s one takes 0.08 ms, which hides what the host does
GAP_BYTES = 512  # between two tensors of a run


def move_terms(terms: Iterable[tuple[Term, torch.device]]) -> None:
    """Put the tensors of terms on a device each, their types unchanged. No term is changed before all copies exist."""
    waiting: dict[torch.device, list[tuple[Term, str, torch.Tensor]]] = {}
    for term, device in terms:
        for holder in term.holders():
            for name in holder.tensor_fields:
                tensor = getattr(holder, name)
                if tensor is not None and tensor.device != device:
                    waiting.setdefault(device, []).append((holder, name, tensor))
    copies = {device: moved([tensor for _, _, tensor in places], device) for device, places in waiting.items()}
    for device, places in waiting.items():
        for (holder, name, _), copy in zip(places, copies[device], strict=True):
            setattr(holder, name, copy)


def moved(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """The same tensors on another device, in their order."""
    found: dict[int, torch.Tensor] = {}
    for run in runs(tensors):
        found.update(zip(run, _copied([tensors[place] for place in run], device), strict=True))
    return [found[place] for place in range(len(tensors))]


def runs(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """Places of tensors that are copied together: of one type and storage, side by side, RUN_BYTES at the most."""
    storages: dict[tuple[int, torch.dtype], list[tuple[int, int, int]]] = {}  # first and last element, place
    found: list[list[int]] = []
    for place, tensor in enumerate(tensors):
        address = tensor.untyped_storage().data_ptr()
        if address and tensor.is_contiguous():
            start = int(tensor.storage_offset())
            storages.setdefault((address, tensor.dtype), []).append((start, start + tensor.numel(), place))
        else:
            found.append([place])
    for (_, dtype), spans in storages.items():
        found += _joined(sorted(spans), dtype.itemsize)
    return found


def _joined(spans: Sequence[tuple[int, int, int]], itemsize: int) -> list[list[int]]:
    """The places of spans in the order of their starts, those together that are near; they may overlap."""
    gap, longest = GAP_BYTES // itemsize, RUN_BYTES // itemsize
    found: list[list[int]] = []
    first = last = 0
    for start, stop, place in spans:
        if found and start <= last + gap and max(stop, last) - first <= longest:
            found[-1].append(place)
            last = max(stop, last)
        else:
            found.append([place])
            first, last = start, stop
    return found


def _copied(run: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """A run on another device, by one copy.

    The host does not wait for a copy to a GPU. That is safe: what reads the result is queued behind the copy; torch
    gives pinned memory to nobody else before copies from it are done; nobody writes to an adapter's tensors; and from
    memory that is not pinned CUDA returns only after the bytes are read.
    """
    waits_not = device.type == "cuda"
    if len(run) == 1:
        return [run[0].to(device, non_blocking=waits_not)]
    start = run[0].storage_offset()
    stop = max(tensor.storage_offset() + tensor.numel() for tensor in run)
    copy = run[0].as_strided((stop - start,), (1,), start).to(device, non_blocking=waits_not)
    return [copy.as_strided(one.shape, one.stride(), one.storage_offset() - start) for one in run]
