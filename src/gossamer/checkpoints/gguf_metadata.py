"""The keys of a GGUF header: values of every type, kept where they are short, stepped over where they are not."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from gossamer.checkpoints.gguf_cursor import U32, U64, Cursor, damaged

MAX_TEXTS = 2_000_000  # in all arrays; the largest vocabularies with their merges have 800,000
KEPT_ITEMS = 1_024  # longer arrays, which are vocabularies, are only counted
KEPT_BYTES = 4 << 20  # of all texts and arrays together; what comes later is only counted

_TEXT, _ARRAY = 8, 9
_NAMES = (
    *("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32"),
    *("bool", "string", "array", "uint64", "int64", "float64"),
)
_CODES = "BbHhIif?--Qqd"  # in the order of the names; texts and arrays have none
_SCALARS: Mapping[int, struct.Struct] = {
    number: struct.Struct("<" + code) for number, code in enumerate(_CODES) if code != "-"
}
_ITEMS = struct.Struct("<IQ")


@dataclass(frozen=True)
class LeftOut:
    """A metadata value that is too long to keep: `kind` is "string" or for example "array of string"."""

    kind: str
    length: int


Scalar = bool | int | float | str
Value = Scalar | tuple[Scalar, ...] | LeftOut


@dataclass
class _Budget:
    """What may still be kept and read."""

    texts: int = MAX_TEXTS
    kept: int = KEPT_BYTES

    def keeps(self, count: int) -> bool:
        """Whether a value of that many bytes is kept; what is kept is counted."""
        if count > self.kept:
            return False
        self.kept -= count
        return True


def read_metadata(cursor: Cursor, count: int) -> dict[str, Value]:
    """That many keys with their values."""
    budget = _Budget()
    metadata: dict[str, Value] = {}
    for index in range(count):
        key = cursor.take_name(f"the name of key {index}")
        if key in metadata:
            damaged(cursor.path, f"The key {key[:80]!r} appears twice.")
        (kind,) = cursor.take(U32, "the type of a value")
        # the alignment decides where data lies, so unlike other values it has to have the type of the specification
        if key == "general.alignment" and kind != 4:
            damaged(cursor.path, "general.alignment is not a uint32.")
        metadata[key] = _value(cursor, budget, key, kind)
    return metadata


def _value(cursor: Cursor, budget: _Budget, key: str, kind: int) -> Value:
    if kind in _SCALARS:
        scalar: Scalar = cursor.take(_SCALARS[kind], f"the value of {key[:80]!r}")[0]
        return scalar
    if kind == _TEXT:
        return _text(cursor, budget, key)
    if kind == _ARRAY:
        return _array(cursor, budget, key)
    damaged(cursor.path, f"The value of {key[:80]!r} has the unknown type {kind}.")


def _text(cursor: Cursor, budget: _Budget, key: str) -> str | LeftOut:
    (length,) = cursor.take(U64, f"the length of {key[:80]!r}")
    cursor.need(length, f"the value of {key[:80]!r}")
    if not budget.keeps(length):
        cursor.position += length
        return LeftOut("string", length)
    # only shown to people: a byte that is not UTF-8 is no reason to refuse the file
    return cursor.take_bytes(length, "a text").decode(errors="replace")


def _array(cursor: Cursor, budget: _Budget, key: str) -> tuple[Scalar, ...] | LeftOut:
    kind, count = cursor.take(_ITEMS, f"the start of the array {key[:80]!r}")
    if kind == _ARRAY:
        damaged(cursor.path, f"{key[:80]!r} is an array of arrays, which no FLUX file needs.")
    if kind == _TEXT:
        return _text_array(cursor, budget, key, count)
    if kind not in _SCALARS:
        damaged(cursor.path, f"The array {key[:80]!r} has items of the unknown type {kind}.")
    layout = _SCALARS[kind]
    cursor.need(count * layout.size, f"the array {key[:80]!r} of {count} items")
    start = cursor.position
    cursor.position += count * layout.size
    if count > KEPT_ITEMS or not budget.keeps(count * layout.size):
        return LeftOut(f"array of {_NAMES[kind]}", count)
    return struct.unpack_from(f"<{count}{layout.format[1:]}", cursor.data, start)


def _text_array(cursor: Cursor, budget: _Budget, key: str, count: int) -> tuple[str, ...] | LeftOut:
    cursor.need(count * 8, f"the array {key[:80]!r} of {count} texts")
    if count > budget.texts:
        damaged(cursor.path, f"Its arrays list more than {MAX_TEXTS} texts.")
    budget.texts -= count
    start = cursor.position
    _skip_texts(cursor, key, count)
    if count > KEPT_ITEMS or not budget.keeps(cursor.position - start):
        return LeftOut("array of string", count)
    cursor.position = start
    return tuple(
        cursor.take_bytes(cursor.take(U64, "a length")[0], "a text").decode(errors="replace") for _ in range(count)
    )


def _skip_texts(cursor: Cursor, key: str, count: int) -> None:
    """Step over texts; a vocabulary has some hundred thousand, so this loop is kept bare."""
    read, data, position, last = U64.unpack_from, cursor.data, cursor.position, cursor.limit - 8
    for _ in range(count):
        if position > last:
            break
        position += 8 + read(data, position)[0]
    else:
        cursor.need(position - cursor.position, f"the array {key[:80]!r}")
        cursor.position = position
        return
    cursor.need(position + 8 - cursor.position, f"the array {key[:80]!r}")
