"""`gossamer plan`: what a model will take on a card, how long it will take, and which way of running it is best.

Works before any download and without a GPU: sizes come from a table of published models, times from data sheets. With
--measure a few steps are run on the GPU that is here, and what was predicted stands beside what was measured.
"""

from __future__ import annotations

import argparse
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.cli.console import print_json
from gossamer.errors import FileMissingError, InvalidOptionError
from gossamer.pipeline.parse import FORMATS, parse_choice, parse_integer, parse_size

if TYPE_CHECKING:
    from gossamer.memory.budget import Budget
    from gossamer.memory.card import Card
    from gossamer.memory.picture import Job
    from gossamer.memory.subject import Subject

ASSUMED_CARD = "RTX 3060 12GB"
MOST_BATCH = 64
MOST_STEPS = 1000


def add_to(verbs: Any) -> None:
    """Add the verb to the parser."""
    parser = verbs.add_parser(
        "plan", help="say what fits on a card, and how fast it will be", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL", help="FLUX.1-dev and the like, a diffusers folder, or a weight file")
    parser.add_argument("--vram", metavar="SIZE", help="GPU memory: 6GB, 6GiB, 5.5G (G and GB are 10^9 bytes)")
    parser.add_argument("--ram", metavar="SIZE", help="host memory (default: this machine's)")
    parser.add_argument("--gpu", metavar="CARD", help="a card by name, such as 'RTX 3060 12GB' (default: the one here)")
    parser.add_argument("--size", type=parse_size, metavar="WxH", help="of the pictures (default: the model's)")
    parser.add_argument("--batch", type=parse_integer, default=1, metavar="N", help="pictures at a time (default: 1)")
    parser.add_argument("--steps", type=parse_integer, metavar="N", help="denoising steps (default: the model's)")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE", help="adapter to attach; repeatable")
    parser.add_argument("--storage", metavar="FORMAT", help="storage format of the transformer (default: the best)")
    parser.add_argument("--text-storage", metavar="FORMAT", help="that of the text encoders (default: the best)")
    parser.add_argument("--compute", default="auto", metavar="WISH", help="type of the products (default: auto)")
    parser.add_argument("--attention", default="auto", metavar="WISH", help="auto or exact (default: auto)")
    parser.add_argument(
        "--offload",
        default="auto",
        metavar="NAME",
        help="auto, none, model, sequential or group (diffusers' words)",
    )
    parser.add_argument(
        "--least-fidelity",
        default="good",
        metavar="LEVEL",
        help="exact, high, good or any, or the coarsest storage format to accept (default: good)",
    )
    parser.add_argument(
        "--measure", action="store_true", help="run a few steps by the chosen plan, and compare it with them"
    )
    parser.add_argument("--base", metavar="MODEL", help="with --measure, where the parts come from that MODEL lacks")
    parser.add_argument("--format", type=parse_choice(FORMATS), default="text", metavar="{text,json}")
    parser.set_defaults(verb=plan)


def plan(arguments: argparse.Namespace) -> int:
    """Print the plans, the chosen one first."""
    if arguments.measure:
        from gossamer.cli.plan_measure import measure

        return measure(arguments)
    from gossamer.kernels.wishes import require_attention_wish, require_wish
    from gossamer.memory.adapter_cost import adapter_cost
    from gossamer.memory.plan import plan as make_plan
    from gossamer.memory.request import PlanRequest

    subject = _subject(arguments.model)
    card, assumed = _card(arguments)
    request = PlanRequest(
        subject=subject,
        card=card,
        budget=_budget(arguments, card, subject),
        job=_job(arguments, subject),
        adapters=tuple(adapter_cost(Path(file), subject.spec.transformer) for file in arguments.lora),
        storage=arguments.storage,
        text_storage=arguments.text_storage,
        compute=require_wish(arguments.compute),
        least_fidelity=arguments.least_fidelity,
        offload=arguments.offload,
        attention=require_attention_wish(arguments.attention),
    )
    made = make_plan(request)
    made = replace(made, notes=(*made.notes, assumed)) if assumed else made
    if arguments.format == "json":
        print_json(made.as_json())
        return 0
    from gossamer.cli.plan_drawing import print_planning

    print_planning(made, request)
    return 0


# the model ------------------------------------------------------------------------------------------------------------


def _subject(name: str) -> Subject:
    """A folder or file that is here, else a published model, else one that was pulled."""
    from gossamer.memory.model_specs import known_model
    from gossamer.memory.subject import file_subject, known_subject
    from gossamer.pipeline.options import EMBEDDED
    from gossamer.pipeline.sources import HubCache, HubRepository, find_source

    known = None if os.path.exists(name) else known_model(name)
    if known is not None and "/" not in name:
        return known_subject(known)
    source = find_source(name)
    if isinstance(source, HubRepository):
        pulled = HubCache.of(source.name).pulled()
        if pulled is not None:
            return _folder(pulled, name)
        if known is not None:
            return known_subject(known)
        raise FileMissingError(
            f"{name!r} cannot be planned for before it is here.",
            "Its sizes are not among those of the published models that are known by name.",
            f"Fetch it with `gossamer pull {name}`, or plan for the model that it was made from, such as FLUX.1-dev.",
        )
    path = source.fetch()
    return _folder(path, name if name == EMBEDDED else path.name) if path.is_dir() else file_subject(path)


def _folder(path: Path, name: str) -> Subject:
    from gossamer.pipeline.fit import subject_of
    from gossamer.pipeline.model import open_folder

    return subject_of(open_folder(path), name)


# the machine and the work ---------------------------------------------------------------------------------------------


def _card(arguments: argparse.Namespace) -> tuple[Card, str | None]:
    """The card that was named, else the one that is here, else one that is assumed, with a note that says so."""
    from gossamer.memory.cards import find_card

    if arguments.gpu is not None:
        return find_card(arguments.gpu), None
    import torch

    from gossamer.pipeline.fit import card_here

    if torch.cuda.is_available():
        return card_here(torch.device("cuda")), None
    if arguments.vram is None:
        raise InvalidOptionError(
            "There is nothing to plan for.",
            "No NVIDIA GPU is here, and neither a card nor its memory was given.",
            "Give --gpu 'RTX 3060 12GB', or at least --vram 6GB.",
        )
    assumed = f"No card was named and none is here: times are those of an {ASSUMED_CARD}. Name yours with --gpu."
    return find_card(ASSUMED_CARD), assumed


def _budget(arguments: argparse.Namespace, card: Card, subject: Subject) -> Budget:
    """What was given, else what is free here; a card that is not here is taken to be free as a whole."""
    from gossamer.memory.budget import HOST_RESERVE, Budget
    from gossamer.memory.byte_sizes import parse_bytes
    from gossamer.memory.offload_host import available_host_bytes

    return Budget(
        gpu=_gpu_memory(arguments, card) if arguments.vram is None else parse_bytes(arguments.vram),
        host=available_host_bytes() if arguments.ram is None else parse_bytes(arguments.ram),
        disk=None if subject.is_here else _free_disk(),
        host_reserve=0 if arguments.ram is None else HOST_RESERVE,
    )


def _gpu_memory(arguments: argparse.Namespace, card: Card) -> int:
    if arguments.gpu is not None:
        return card.memory_bytes
    import torch

    return torch.cuda.mem_get_info()[0]


def _free_disk() -> int:
    """Free bytes where the hub's cache is, or will be."""
    from huggingface_hub import constants

    place = Path(constants.HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _job(arguments: argparse.Namespace, subject: Subject) -> Job:
    from gossamer.memory.picture import Job

    spec = subject.spec
    steps = spec.steps if arguments.steps is None else arguments.steps
    _require_whole("batch", arguments.batch, MOST_BATCH)
    _require_whole("steps", steps, MOST_STEPS)
    width, height = (spec.side, spec.side) if arguments.size is None else (arguments.size.width, arguments.size.height)
    return Job(width, height, arguments.batch, steps, spec.text_tokens)


def _require_whole(name: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise InvalidOptionError(
            f"{value} is not a usable value for {name}.", f"It must be from 1 to {most}.", f"Try --{name} 1."
        )
