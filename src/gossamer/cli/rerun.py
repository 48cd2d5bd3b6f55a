"""`gossamer rerun`: paint a picture again from the settings it carries, and compare the pixels."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.cli.console import note, note_adapters, print_json, progress_bar
from gossamer.errors import OutputError
from gossamer.pipeline.options import LoadOptions, make
from gossamer.pipeline.parse import FORMATS, parse_choice

if TYPE_CHECKING:
    from gossamer.pipeline.rerun import Rerun


def add_to(verbs: Any) -> None:
    """Add the verb to the parser."""
    parser = verbs.add_parser("rerun", help="paint a picture again", description=__doc__, allow_abbrev=False)
    parser.add_argument("picture", metavar="PICTURE", help="a PNG that `gossamer run` wrote")
    parser.add_argument("--output", metavar="FILE", help="the new picture (default: PICTURE with -rerun in its name)")
    parser.add_argument("--overwrite", action="store_true", help="replace the new picture where it exists")
    parser.add_argument("--device", metavar="DEVICE", help="as in `gossamer run`")
    parser.add_argument("--format", type=parse_choice(FORMATS), default="text", metavar="{text,json}")
    parser.set_defaults(verb=rerun)


def rerun(arguments: argparse.Namespace) -> int:
    """Exit code 0 if the pixels are the same, else 1."""
    loading = make(LoadOptions, {"device": arguments.device})
    picture = Path(arguments.picture)
    output = Path(arguments.output or picture.with_name(f"{picture.stem}-rerun.png"))

    from gossamer.pipeline.adapter_report import report_adapter
    from gossamer.pipeline.outputs import require_place
    from gossamer.pipeline.picture import save
    from gossamer.pipeline.rerun import prepare_rerun

    require_place(output)
    if os.path.exists(output) and not arguments.overwrite:
        raise OutputError(
            f"{str(output)!r} exists.", "A rerun never replaces a picture unasked.", "Give --output, or --overwrite."
        )
    ready = prepare_rerun(picture, loading.device)
    for text in ready.notes:
        note(f"warning: {text}")
    note_adapters([report_adapter(named) for named in ready.prepared.adapters], ready.options.steps)
    with progress_bar(ready.options.steps) as bar:
        result = ready.paint(bar.on_step, lambda: bar.say("Painting"))
        save(result.painting.image, output)
    _report(result, output, arguments.format)
    return 0 if result.identical else 1


def _report(result: Rerun, output: Path, form: str) -> None:
    if form == "json":
        print_json(
            {
                "path": str(output),
                "identical": result.identical,
                "largest_difference": result.largest_difference,
                "pixels_sha256": result.painting.pixels_sha256,
                "warnings": list(result.notes),
            }
        )
    elif result.identical:
        print(f"{output}  the same pixels")
    else:
        print(f"{output}  other pixels: a channel differs by up to {result.largest_difference}/255")
