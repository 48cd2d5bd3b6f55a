"""Storage formats in pure torch: the truth about bytes. One file a format."""

from gossamer.formats.packed import Format, Packed
from gossamer.formats.registry import (
    find_format,
    find_packing_format,
    pack,
    packed_bytes,
    packing_names,
    storage_names,
    unpack,
)

__all__ = [
    "Format",
    "Packed",
    "find_format",
    "find_packing_format",
    "pack",
    "packed_bytes",
    "packing_names",
    "storage_names",
    "unpack",
]
