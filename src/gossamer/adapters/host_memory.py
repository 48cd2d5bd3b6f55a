"""How an adapter that was read lies in host memory until it is attached: ready to be copied to a GPU in few runs.

    buffer 0   low-rank factors of one linear in all blocks: [down][down] ... [up][up] ..., then of the next linear
    buffer 1   ... BUFFER_BYTES each at the most
    buffer n   biases, magnitudes, and the tensors of other kinds

and the same again for each text encoder. Tensors above LARGEST_BYTES stay where they are: differences of whole weights,
gigabytes in all, whose copies take long enough each.

Buffers are page-locked ("pinned"): a GPU reads them by itself, at the full speed of the bus, while the host goes on.
Page-locking takes longer than the copy, so it belongs to reading a file, not to attaching. The order is that in which
the decode kernels' stacks take factors over: alone, and one linear in all blocks at once. So what was copied together
is free together (see `layers.moves`).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import TypeVar

import torch

from gossamer.adapters.adapter import Adapter
from gossamer.adapters.terms import LinearTerm, LowRankTerm, Matrix, tensors_of

BUFFER_BYTES = 32 << 20  # torch rounds pinned memory up to a power of two, which only the last buffer feels
LARGEST_BYTES = 16 << 20  # rank 256 of FLUX.1's widest linear in float32 has 13 MB, a difference 19 and more in bf16
ALIGNMENT = 256  # of each tensor in bytes, as every kernel can use it

Part = TypeVar("Part", bound=LinearTerm | Matrix)
Allocate = Callable[[int], torch.Tensor]  # count to unwritten bytes, uint8 (count,)


def ready_for(adapter: Adapter, device: torch.device | str) -> Adapter:
    """The adapter as it is best kept for a model on that device; the values are the same."""
    if torch.device(device).type != "cuda":
        return adapter  # attached as it is: nothing is copied
    return side_by_side(adapter, pinned_bytes)


def side_by_side(adapter: Adapter, allocate: Allocate) -> Adapter:
    """The adapter with its terms' tensors copied into a few buffers."""
    terms = _placed(adapter.terms, allocate)
    return replace(adapter, terms=terms, text={name: _placed(of, allocate) for name, of in adapter.text.items()})


def pinned_bytes(count: int) -> torch.Tensor:
    """Unwritten pinned memory, uint8 (count,). Where the system allows no more of it, plain memory and a warning."""
    try:
        return torch.empty(count, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:  # nothing but the allocation runs here, and only the speed of a copy hangs on it
        warnings.warn(
            f"{count / 1e6:.0f} MB of an adapter could not be put into pinned memory: {error}. "
            "Attaching it takes longer; raise the limit of locked memory (ulimit -l) to change that.",
            stacklevel=2,
        )
        return torch.empty(count, dtype=torch.uint8)


def _placed(terms: Mapping[str, LinearTerm], allocate: Allocate) -> dict[str, LinearTerm]:
    """The same terms, their tensors in buffers; what several terms share, as parts of a fused module do, is one."""
    copies: dict[int, torch.Tensor] = {}
    for tensors in _divided(terms):
        small = [tensor for tensor in tensors if tensor.nbytes <= LARGEST_BYTES]
        for batch in _batches(small):
            copies.update(zip(map(id, batch), _copied(batch, allocate), strict=True))
    return {name: _exchanged(term, copies) for name, term in terms.items()}


def _divided(terms: Mapping[str, LinearTerm]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Low-rank factors by type and linear, downs before ups, and everything else; no tensor twice."""
    factors: dict[int, torch.Tensor] = {}
    others: dict[int, torch.Tensor] = {}
    places: dict[int, tuple[str, int, int]] = {}
    linears: dict[str, int] = {}
    for name, term in terms.items():
        linear = linears.setdefault(_without_block(name), len(linears))
        own = (term.down, term.up) if isinstance(term, LowRankTerm) else ()
        for side, tensor in enumerate(own):
            factors[id(tensor)] = tensor
            places.setdefault(id(tensor), (str(tensor.dtype), linear, side))
        others.update((id(tensor), tensor) for tensor in tensors_of(term))
    rest = [tensor for key, tensor in others.items() if key not in factors]
    return sorted(factors.values(), key=lambda tensor: places[id(tensor)]), rest


def _without_block(name: str) -> str:
    """What a linear is called in every block: its name without the first number."""
    return re.sub(r"\.\d+\.", ".", name, count=1)


def _batches(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Tensors of one buffer each, in order."""
    batch: list[torch.Tensor] = []
    used = 0
    for tensor in tensors:
        if batch and used + tensor.nbytes > BUFFER_BYTES:
            yield batch
            batch, used = [], 0
        batch.append(tensor)
        used += _aligned(tensor.nbytes)
    if batch:
        yield batch


def _copied(batch: Sequence[torch.Tensor], allocate: Allocate) -> list[torch.Tensor]:
    """The tensors side by side in a new buffer."""
    buffer, stop, copies = allocate(sum(_aligned(tensor.nbytes) for tensor in batch)), 0, []
    for tensor in batch:
        start, stop = stop, stop + _aligned(tensor.nbytes)
        place = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        copies.append(place.copy_(tensor))
    return copies


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def _exchanged(part: Part, copies: Mapping[int, torch.Tensor]) -> Part:
    """A term, or a factor of one, with those of its tensors that were copied."""
    changes: dict[str, object] = {}
    for known in fields(part):  # type: ignore[arg-type]
        value = getattr(part, known.name)
        if isinstance(value, torch.Tensor):
            changes[known.name] = copies.get(id(value), value)
        elif isinstance(value, (LinearTerm, Matrix)):
            changes[known.name] = _exchanged(value, copies)
    return replace(part, **changes)  # type: ignore[type-var]
