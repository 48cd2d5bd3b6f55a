"""`gossamer doctor`: what this machine can do, and what would run for each storage format, with the reasons."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gossamer.cli.console import print_json
from gossamer.errors import InvalidOptionError
from gossamer.pipeline.parse import FORMATS, parse_choice

if TYPE_CHECKING:
    from gossamer.kernels.capability import Capability
    from gossamer.kernels.choice import Choice
    from gossamer.kernels.options import Reason

COLUMNS = ("storage", "compute", "decode", "merge", "product", "attention")


def add_to(verbs: Any) -> None:
    """Add the verb to the parser."""
    parser = verbs.add_parser(
        "doctor", help="say what would run here, and why", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--storage", metavar="NAME", help="one format, with every rejected alternative (default: all)")
    parser.add_argument(
        "--compute", default="auto", metavar="WISH", help="auto, exact, fp8, int8, bf16, fp16 or fp32 (default: auto)"
    )
    parser.add_argument("--attention", default="auto", metavar="WISH", help="auto or exact (default: auto)")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, mps, cuda or cuda:N (default: the fastest kind)")
    parser.add_argument("--format", type=parse_choice(FORMATS), default="text", metavar="{text,json}")
    parser.set_defaults(verb=doctor)


def doctor(arguments: argparse.Namespace) -> int:
    """Print the capability, and the choice for one storage format or for all."""
    from gossamer.formats import storage_names
    from gossamer.kernels.choice import as_text
    from gossamer.kernels.detect import detect

    capability = detect(arguments.device)
    storages = storage_names() if arguments.storage is None else (arguments.storage,)
    choices, impossible = _choose_all(capability, storages, arguments.compute, arguments.attention)
    if arguments.format == "json":
        machine = {**asdict(capability), "chip": capability.chip}
        print_json({"machine": machine, "choices": [asdict(each) for each in choices], "impossible": impossible})
        return 0
    _print_machine(capability)
    if arguments.storage is None:
        _print_table(choices)
    else:
        print(as_text(choices[0]))
    for storage, why in impossible.items():
        print(f"{storage} cannot be used: {why}")
    return 0


def _choose_all(
    capability: Capability, storages: tuple[str, ...], wish: str, attention: str
) -> tuple[list[Choice], dict[str, str]]:
    """The choices, and why there is none, by storage; where there is none at all, the error itself."""
    from gossamer.kernels.choice import choose

    choices, impossible = [], {}
    for storage in storages:
        try:
            choices.append(choose(capability, storage, wish, attention=attention))
        except InvalidOptionError as error:
            if storage == storages[-1] and not choices:
                raise
            impossible[storage] = error.why
    return choices, impossible


def _print_machine(capability: Capability) -> None:
    versions = {"CUDA": capability.cuda_version, "torch": capability.torch_version}
    told = [f"{name} {pair[0]}.{pair[1]}" for name, pair in versions.items() if pair is not None]
    if capability.memory_bytes is not None:
        told.append(f"{capability.memory_bytes / 1e9:.1f} GB of memory")
    print(f"{capability.name}: {capability.chip}, {capability.system}, {', '.join(told)}")
    print(f"Triton: {capability.triton or f'no, {capability.triton_obstacle}'}")


def _print_table(choices: list[Choice]) -> None:
    """One row a storage; below it every reason once, with the storages that it holds for."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*COLUMNS)
    for choice in choices:
        table.add_row(*(str(getattr(choice, column)) for column in COLUMNS))
    Console().print(table)
    storages: dict[tuple[str, str, str], list[str]] = {}
    for choice in choices:
        for reason in choice.reasons:
            storages.setdefault((reason.part, reason.option, reason.text), []).append(choice.storage)
        for reason in _why_no_kernel(choice):
            storages.setdefault((reason.part, f"not {reason.option}", reason.text), []).append(choice.storage)
    for part, option, text in sorted(storages):
        held = _summary(storages[part, option, text], [choice.storage for choice in choices])
        print(f"{part} {option}: {text} ({held})")


def _why_no_kernel(choice: Choice) -> list[Reason]:
    """Why Triton does not decode, where it does not: a slower path is never taken without a word."""
    return [reason for reason in choice.rejected if (reason.part, reason.option) == ("merge", "triton")]


def _summary(held: list[str], known: list[str]) -> str:
    """The names in `held`, or those that are missing from it, whichever are fewer."""
    missing = [name for name in known if name not in held]
    if len(missing) >= len(held):
        return ", ".join(held)
    return f"all but {', '.join(missing)}" if missing else "all"
