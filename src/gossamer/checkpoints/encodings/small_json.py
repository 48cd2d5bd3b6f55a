"""JSON that describes a weight: small, flat and honest, or refused before it takes memory."""

from __future__ import annotations

import json
from typing import Any, NoReturn

MOST_BYTES = 1 << 16  # a real description takes 60 to 300


def parse_object(text: bytes, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """The JSON object in `text`; every fault is a ValueError that says what is wrong.

    Python's objects take up to 35 times the bytes of the text, so the text's length bounds the memory.
    """
    if len(text) > most_bytes:
        raise ValueError(f"it takes {len(text)} bytes; at most {most_bytes} are allowed")
    try:
        content = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("it is not an object")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key appears twice")
    return content


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number of JSON")
