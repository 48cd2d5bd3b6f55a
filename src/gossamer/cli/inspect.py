"""`gossamer inspect`: what an adapter or checkpoint file holds, from its header alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.cli.console import print_json
from gossamer.pipeline.parse import FORMATS, parse_choice

if TYPE_CHECKING:
    from gossamer.pipeline.inspect import Inspection

UNUSED_SHOWN = 10


def add_to(verbs: Any) -> None:
    """Add the verb to the parser."""
    parser = verbs.add_parser("inspect", help="say what a file holds", description=__doc__, allow_abbrev=False)
    parser.add_argument("file", type=Path, metavar="FILE", help="an adapter or checkpoint, .safetensors or .gguf")
    parser.add_argument("--hash", action="store_true", help="also the SHA-256, for which the whole file is read")
    parser.add_argument("--format", type=parse_choice(FORMATS), default="text", metavar="{text,json}")
    parser.set_defaults(verb=inspect_file)


def inspect_file(arguments: argparse.Namespace) -> int:
    """Print the answer."""
    from gossamer.pipeline.inspect import inspect

    found = inspect(arguments.file, arguments.hash)
    if arguments.format == "json":
        print_json(found.as_json())
    else:
        print("\n".join(f"{name + ':':14}{text}" for name, text in _lines(found) if text))
    return 0


def _lines(found: Inspection) -> list[tuple[str, str]]:
    modules = ", ".join(f"{count} in the {component}" for component, count in found.modules.items() if count)
    storage = ", ".join(f"{count} x {dtype}" for dtype, count in found.storage.items())
    shown = [*found.unused[:UNUSED_SHOWN], *(["..."] if len(found.unused) > UNUSED_SHOWN else [])]
    return [
        ("kind", found.kind),
        ("layout", found.layout),
        ("model", found.model),
        ("made for", found.base_model or ""),
        ("trigger", found.trigger or ""),
        ("keys", f"{found.used} of {found.total} used"),
        ("unused", ", ".join(shown)),
        ("modules", modules),
        ("ranks", ", ".join(map(str, found.ranks))),
        ("stored as", storage + (f" ({', '.join(found.notes)})" if found.notes else "")),
        ("parameters", f"{found.parameters:,}"),
        ("sha256", found.sha256 or ""),
    ]
