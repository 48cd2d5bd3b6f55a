"""Versions that a picture records, because a result may differ between them."""

from __future__ import annotations

from importlib.metadata import version

VERSION = "0.1.0"
LIBRARIES = ("torch", "diffusers", "transformers")


def versions() -> dict[str, str]:
    """Version of Gossamer and of each library that takes part in a picture."""
    return {"gossamer": VERSION, **{library: version(library) for library in LIBRARIES}}
