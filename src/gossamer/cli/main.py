"""The `gossamer` command: finds the verb, and turns every error into three parts and an exit code.

0    done                     2    an error of the user or of a file, in three parts
1    `rerun`: other pixels    130  interrupted
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gossamer.cli import doctor, formats, inspect, plan, pull, rerun, run
from gossamer.cli.arguments import Parser, parse
from gossamer.cli.console import print_error, wants_json
from gossamer.errors import GossamerError
from gossamer.pipeline.versions import VERSION

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code comes back."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        arguments = parse(_parser(), argv)
        code: int = arguments.verb(arguments)
    except GossamerError as error:
        print_error(error, as_json=wants_json(argv))
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    return code


def _parser() -> Parser:
    parser = Parser(prog="gossamer", description="Paints pictures with big diffusion transformers.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"gossamer {VERSION}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for verb in (run, rerun, plan, pull, formats, inspect, doctor):
        verb.add_to(verbs)
    return parser
