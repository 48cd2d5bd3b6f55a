"""`gossamer formats`: the storage formats, what a weight takes in each, and which ones weights can be packed into."""

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
    from gossamer.formats import find_format, packed_bytes, storage_names

    known = [find_format(name) for name in storage_names()]
    bits = {each.name: packed_bytes(each.name, SIDE, SIDE) * 8 / SIDE**2 for each in known}
    if arguments.format == "json":
        rows = [{"name": e.name, "bits_per_weight": round(bits[e.name], 4), "packs": e.packs} for e in known]
        print_json({"formats": rows})
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("storage", "bits per weight", "use", title=f"Storage formats, weight of {SIDE} x {SIDE}")
    for each in known:
        table.add_row(each.name, f"{bits[each.name]:.3f}", "packs and reads" if each.packs else "reads")
    Console().print(table)
    return 0
