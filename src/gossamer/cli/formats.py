"""`gossamer formats`: the storage formats and what a weight takes in each."""

from __future__ import annotations

import argparse
from typing import Any

from gossamer.cli.console import print_json
from gossamer.pipeline.parse import FORMATS, parse_choice

SIDE = 3072  # the width of FLUX.1, so that scales by row count as they do there


def add_to(verbs: Any) -> None:
    """Add the verb to the parser."""
    parser = verbs.add_parser("formats", help="list the storage formats", description=__doc__, allow_abbrev=False)
    parser.add_argument("--format", type=parse_choice(FORMATS), default="text", metavar="{text,json}")
    parser.set_defaults(verb=formats)


def formats(arguments: argparse.Namespace) -> int:
    """Print every format with its bits per weight, scales included, for a weight of 3072 x 3072."""
    from gossamer.formats import packed_bytes, storage_names

    bits = {name: packed_bytes(name, SIDE, SIDE) * 8 / SIDE**2 for name in storage_names()}
    if arguments.format == "json":
        print_json({"formats": [{"name": name, "bits_per_weight": round(each, 4)} for name, each in bits.items()]})
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("storage", "bits per weight", title=f"Storage formats, weight of {SIDE} x {SIDE}")
    for name, each in bits.items():
        table.add_row(name, f"{each:.3f}")
    Console().print(table)
    return 0
