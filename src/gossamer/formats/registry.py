"""Every storage format by name, and the three things one does with a format: pack, unpack, count bytes."""

from __future__ import annotations

from difflib import get_close_matches

import torch

from gossamer.errors import UnknownStorageError
from gossamer.formats import four_bit, fp8, gguf, int8, plain
from gossamer.formats.checks import require_width
from gossamer.formats.packed import Format, Packed

FORMATS: tuple[Format, ...] = (
    *plain.FORMATS,
    *fp8.FORMATS,
    *int8.FORMATS,
    *four_bit.FORMATS,
    *gguf.FORMATS,
)


def storage_names() -> tuple[str, ...]:
    """Names of all storage formats, widest first within a family."""
    return tuple(known.name for known in FORMATS)


def packing_names() -> tuple[str, ...]:
    """Names of the formats that a weight can be packed into."""
    return tuple(known.name for known in FORMATS if known.packs)


def find_format(name: str) -> Format:
    """The format called `name`; case does not matter."""
    for known in FORMATS:
        if known.name.lower() == name.lower():
            return known
    by_lower = {known.lower(): known for known in storage_names()}
    closest = get_close_matches(name.lower(), by_lower, n=1)
    raise UnknownStorageError(
        f"There is no storage format called {name!r}.",
        f"The formats are: {', '.join(storage_names())}.",
        f"Did you mean {by_lower[closest[0]]!r}?" if closest else "Choose one of these names.",
    )


def find_packing_format(name: str) -> Format:
    """The format called `name`, if weights can be packed into it."""
    found = find_format(name)
    if found.packs:
        return found
    raise UnknownStorageError(
        f"Weights cannot be packed as {found.name}.",
        "Gossamer only reads this format, from files that hold it already.",
        f"Choose one of {', '.join(packing_names())}.",
    )


def pack(weight: torch.Tensor, storage: str) -> Packed:
    """A float weight (out, in) as it will stay in memory; the weight itself is left as it is."""
    chosen = find_packing_format(storage)
    if weight.dim() == 2:
        require_width(chosen.name, weight.shape[1], chosen.width_multiple)
    return chosen.pack(weight)


def unpack(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """The weight (out, in) in `dtype`; shares memory with `packed` only where the stored type already is `dtype`."""
    return find_format(packed.format).unpack(packed, dtype)


def packed_bytes(storage: str, out_features: int, in_features: int) -> int:
    """Exact bytes of a weight (out, in) in a format, without making one."""
    chosen = find_format(storage)
    require_width(chosen.name, in_features, chosen.width_multiple)
    return chosen.packed_bytes(out_features, in_features)
