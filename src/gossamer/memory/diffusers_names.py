"""The ways of saving memory that people know from diffusers and accelerate, by those names, as placements of ours.

Each is explained, because what it stands for is done in another way here: only packed bytes travel, whole blocks of
them, ahead of their use; so every storage format and every adapter goes with every placement.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

from gossamer.errors import InvalidOptionError, UnknownOptionError
from gossamer.memory.placement import Placement


@dataclass(frozen=True)
class Offload:
    """A name, what it means here, and which placements of `blocks` blocks it allows."""

    name: str
    aliases: tuple[str, ...]
    explanation: str
    allows: Callable[[Placement, int], bool]


def _anything(placement: Placement, blocks: int) -> bool:
    return True


def _everything_resident(placement: Placement, blocks: int) -> bool:
    return placement.resident_blocks == blocks and placement.text == "resident"


def _model(placement: Placement, blocks: int) -> bool:
    return placement.resident_blocks == blocks and placement.text == "evicted"


def _all_streamed(placement: Placement, blocks: int) -> bool:
    return placement.resident_blocks == 0 and placement.text == "streamed"


def _group(placement: Placement, blocks: int) -> bool:
    return placement.resident_blocks == 0


OFFLOADS: tuple[Offload, ...] = (
    Offload("auto", (), "the fastest placement that fits", _anything),
    Offload("none", ("off", "cuda"), "everything stays on the GPU at all times", _everything_resident),
    Offload(
        "model",
        ("enable_model_cpu_offload", "model-cpu-offload"),
        "model offload: one model after the other; the text encoders run and leave, then the whole transformer comes",
        _model,
    ),
    Offload(
        "sequential",
        ("enable_sequential_cpu_offload", "sequential-cpu-offload"),
        "sequential offload: nothing stays; text encoders come layer by layer and the transformer block by block, each "
        "copied while the one before it computes. diffusers copies layer by layer and waits for each",
        _all_streamed,
    ),
    Offload(
        "group",
        ("enable_group_offload", "group-offload", "group-leaf", "group-block", "leaf_level", "block_level"),
        "group offload: every block of the transformer is streamed, in groups of one block, on a stream of its own",
        _group,
    ),
)

# Placements that spread a model over devices; one GPU is what a plan is for.
SPREAD = ("balanced", "balanced_low_0", "custom", "device_map")


def find_offload(name: str) -> Offload:
    """The offload of that name, its diffusers method's name included."""
    wanted = name.strip().lower()
    for offload in OFFLOADS:
        if wanted in (offload.name, *offload.aliases):
            return offload
    if wanted in SPREAD:
        raise InvalidOptionError(
            f"--offload {name} cannot be planned.",
            "A device map of that kind spreads modules over several devices; a plan is for one GPU and its host, and a "
            "module that stays on the CPU would compute there.",
            "Use 'auto': as many blocks as fit stay on the GPU, and the others are streamed to it.",
        )
    known = [spelling for offload in OFFLOADS for spelling in (offload.name, *offload.aliases)]
    nearest = get_close_matches(wanted, known, n=1)
    raise UnknownOptionError(
        f"There is no offload called {name!r}.",
        f"The names are: {', '.join(offload.name for offload in OFFLOADS)}; diffusers' own method names do as well.",
        f"Did you mean {nearest[0]!r}?" if nearest else "Use 'auto'.",
    )


def gguf_note(offload: Offload, storage: str, is_gguf: bool) -> str | None:
    """What others make of a combination that works here."""
    if is_gguf and offload.name == "sequential":
        return f"{storage} with sequential offload ends in `KeyError: None` in diffusers; here the packed bytes travel"
    return None
