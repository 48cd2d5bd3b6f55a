"""safetensors files: a bounded check of the header in front of the reader, then the tensors and the SHA-256.

    bytes 0..7        length n of the header, unsigned 64 bit, little endian; at most 6 MiB here
    bytes 8..8+n      JSON: {"__metadata__": {str: str}, name: {"dtype", "shape", "data_offsets": [start, stop]}, ...}
    the rest          tensor data; offsets count from here and cover every byte exactly once

Nothing in a header is believed before it agrees with the size of the file. The bounds here are below those of the
format's own library, so that no header takes more than 100 MB of memory to parse. Pickled checkpoints are refused:
reading one runs the code inside it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from gossamer.errors import FileDamagedError, FileMissingError

MAX_HEADER_BYTES = 6 << 20  # a text with one emoji takes 4 bytes a character, and is held twice while it is parsed
MAX_TENSORS = 16_384  # the largest files have some 4,000
MAX_DIMENSIONS = 32
MAX_ELEMENTS = 2**58  # so that no count of bytes overflows 64 bit
MAX_COMMAS = 6 * MAX_TENSORS  # outside of texts; the entry of a matrix has five
MAX_QUOTES = 20 * MAX_TENSORS  # around texts; an entry has ten

DTYPE_BITS: Mapping[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")

# what stands at the start of files that are often handed over in place of a safetensors file
FOREIGN_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"<!doctype", "a web page, probably a login or error page that was saved in place of the download"),
    (b"<html", "a web page, probably a login or error page that was saved in place of the download"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file that it points to"),
    (b"gguf", "a GGUF file"),
)


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as the header describes it; `start` and `stop` are byte offsets into the data part."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """A header that agrees with its file: tensors by name in the order of the header, and the free-form metadata."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def read_header(path: Path | str) -> Header:
    """Read and check the header; no tensor data is read."""
    path = Path(path)
    size = require_file(path)
    with path.open("rb") as file:
        start = file.read(512)
        refuse_foreign(path, start)
        if size < 8:
            _damaged(path, f"It has {size} bytes; the length of the header alone takes 8.")
        header_bytes = int.from_bytes(start[:8], "little")
        _check_header_bytes(path, header_bytes, size)
        if start[8:9] != b"{":
            _damaged(path, "Its header is not a JSON object.")
        file.seek(8)
        content = _parse(path, file.read(header_bytes))
    metadata = _metadata(path, content.pop("__metadata__", {}))
    tensors = {name: _entry(path, name, fields) for name, fields in content.items()}
    _check_cover(path, tensors, size - 8 - header_bytes)
    return Header(tensors, metadata)


def read_tensors(path: Path | str) -> dict[str, torch.Tensor]:
    """Every tensor by name, on the CPU and in its own type, after the header was checked."""
    read_header(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise damage(Path(path), f"The safetensors reader says: {error}.") from error


def sha256_file(path: Path | str) -> str:
    """SHA-256 of the file's bytes, in hexadecimal."""
    path = Path(path)
    require_file(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# what the file is


def require_file(path: Path) -> int:
    """Size in bytes of a readable regular file."""
    try:
        if not path.is_file():
            raise FileMissingError(
                f"There is no file {str(path)!r}.",
                "It is a folder." if path.is_dir() else "Nothing is at that path.",
                "Check the spelling of the path and the folder it starts from.",
            )
        with path.open("rb"):
            return path.stat().st_size
    except OSError as error:
        raise FileMissingError(
            f"{str(path)!r} cannot be read.",
            f"The system says: {error.strerror or error}.",
            "Check the permissions of the file and its folders.",
        ) from error


def refuse_foreign(path: Path, start: bytes, wanted: str = "safetensors") -> None:
    """Name what is often handed over in place of the wanted kind of file; `start` is the first 512 bytes."""
    if path.suffix.lower() in PICKLE_SUFFIXES or start[:4] == b"PK\x03\x04" or _starts_like_pickle(start):
        raise FileDamagedError(
            f"{str(path)!r} is a pickled checkpoint, which Gossamer does not open.",
            "Unpickling runs code from the file, so a downloaded one could do anything.",
            "Get the .safetensors version of it, or convert it once with a tool that you trust.",
        )
    beginning = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for prefix, description in FOREIGN_STARTS:
        if beginning.startswith(prefix):
            raise FileDamagedError(
                f"{str(path)!r} is not a {wanted} file.",
                f"It begins like {description}.",
                "Download the file again and compare its size with the one that the source states.",
            )


def _starts_like_pickle(start: bytes) -> bool:
    """A pickle of protocol 2 to 5. Read as a header length these bytes could be valid, so the JSON must be absent."""
    return len(start) > 2 and start[0] == 0x80 and 2 <= start[1] <= 5 and start[8:9] != b"{"


def _check_header_bytes(path: Path, header_bytes: int, size: int) -> None:
    if header_bytes > MAX_HEADER_BYTES:
        _damaged(path, f"It claims a header of {header_bytes} bytes; the most that is allowed is {MAX_HEADER_BYTES}.")
    if header_bytes > size - 8:
        _damaged(path, f"It claims a header of {header_bytes} bytes but holds only {size} bytes in all: it is cut off.")


# what the header says


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    _check_counts(path, text)
    try:
        # decoded here: json itself would take UTF-16 too, and hold the bytes while it parses
        decoded = text.decode()
        del text
        content = json.loads(decoded, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise damage(path, f"Its header is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        _damaged(path, "Its header is not a JSON object.")
    return content


def _check_counts(path: Path, text: bytes) -> None:
    """Count before parsing: Python objects take up to 80 times the bytes of the text."""
    if text.count(b'"data_offsets"') > MAX_TENSORS:
        _damaged(path, f"Its header lists more than {MAX_TENSORS} tensors.")
    plain = text.replace(rb"\\", b"").replace(rb"\"", b"")
    if plain.count(b'"') > MAX_QUOTES:
        _damaged(path, f"Its header lists more than {MAX_QUOTES // 2} texts.")
    if sum(part.count(b",") for part in plain.split(b'"')[::2]) > MAX_COMMAS:
        _damaged(path, f"Its header lists more than {MAX_COMMAS} values.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        _check_text(name)
        if name in content:
            raise ValueError(f"the key {name[:80]!r} appears twice")
        content[name] = value
    return content


def _check_text(text: str) -> None:
    """JSON can spell half a surrogate pair, which no output could ever print."""
    text.encode()


def _metadata(path: Path, metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _damaged(path, "Its metadata is not a table of texts.")
    try:
        for value in metadata.values():
            _check_text(value)
    except UnicodeEncodeError as error:
        raise damage(path, f"Its metadata is not valid text: {error.reason}.") from error
    return metadata


def _entry(path: Path, name: str, fields: object) -> TensorEntry:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        _damaged(path, f"The entry of {name[:80]!r} is not dtype, shape and data_offsets.")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _damaged(path, f"{name[:80]!r} has the unknown dtype {str(dtype)[:40]!r}.")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        _damaged(path, f"{name[:80]!r} has no valid shape.")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _damaged(path, f"{name[:80]!r} has no valid data_offsets.")
    # Python's integers do not overflow; an empty dimension must not hide that the others would
    if math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        _damaged(path, f"{name[:80]!r} claims the shape {shape}, more elements than any file holds.")
    if math.prod(shape) * DTYPE_BITS[dtype] != (offsets[1] - offsets[0]) * 8:
        _damaged(
            path,
            f"{name[:80]!r} of shape {shape} and dtype {dtype} does not fill its {offsets[1] - offsets[0]} bytes.",
        )
    return TensorEntry(dtype, tuple(shape), offsets[0], offsets[1])


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_cover(path: Path, tensors: Mapping[str, TensorEntry], data_bytes: int) -> None:
    """Every byte of the data part belongs to exactly one tensor."""
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            fault = "overlaps the tensor before it" if entry.start < end else "leaves a hole before it"
            _damaged(path, f"{name[:80]!r} {fault}: it starts at byte {entry.start} of the data, {end} was expected.")
        end = entry.stop
    if end > data_bytes:
        _damaged(path, f"Its tensors take {end} bytes but only {data_bytes} are there: the file is cut off.")
    if end < data_bytes:
        _damaged(path, f"{data_bytes - end} bytes past the last tensor belong to nothing.")


def damage(path: Path, why: str, kind: str = "safetensors file") -> FileDamagedError:
    """The error for a file that is not what it says."""
    return FileDamagedError(
        f"{str(path)!r} is not a sound {kind}.",
        why,
        "Download or copy the file again and compare its SHA-256 with the one that the source states.",
    )


def _damaged(path: Path, why: str) -> NoReturn:
    raise damage(path, why)
