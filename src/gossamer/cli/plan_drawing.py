"""How `gossamer plan` shows plans to people: a table, how the chosen one uses the GPU, and the reasons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from gossamer.memory.byte_sizes import show_bytes
from gossamer.memory.fidelity import show

if TYPE_CHECKING:
    from gossamer.memory.request import Plan, Planning, PlanRequest

BAR = 60  # characters that stand for the whole GPU
MARKS = {
    "resident blocks": "#",
    "slots": "=",
    "embedders": "e",
    "modulation": "m",
    "adapters": "a",
    "text encoders": "t",
    "VAE": "v",
    "decoded weights": "d",
    "activations": "~",
    "captured steps": "c",
    "libraries": "l",
}


def print_planning(planning: Planning, request: PlanRequest) -> None:
    """Everything, on stdout."""
    console = Console()
    shown = _rows(planning)
    console.print(_table(shown))
    if len(shown) < len(planning.plans):
        console.print(f"{len(planning.plans) - len(shown)} more with --format json.", highlight=False)
    chosen = planning.chosen
    console.print(f"\nChosen: {chosen.summary}", highlight=False)
    for reason in chosen.reasons:
        console.print(f"  {reason}", highlight=False, markup=False)
    if len(shown) > 1:
        console.print("\nNot chosen:", highlight=False)
    for line in whys(shown):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"\nThe GPU, {show_bytes(request.budget.gpu)}, phase by phase:", highlight=False)
    for line in drawing(chosen.gpu_bytes, request.budget.gpu, request.budget.gpu - request.budget.gpu_free):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if planning.refused:
        console.print("\nRefused:", highlight=False)
    for refused in planning.refused:
        console.print(f"  {refused.what}: {refused.why} Instead: {refused.instead}", highlight=False, markup=False)
    console.print()
    for note in planning.notes:
        console.print(note, highlight=False, markup=False)


def _rows(planning: Planning) -> list[Plan]:
    """Every placement of the chosen format, and the best of each other one."""
    chosen = planning.chosen
    best: dict[str, Plan] = {}
    for plan in planning.plans:
        best.setdefault(plan.storage, plan)
    return [plan for plan in planning.plans if plan.storage == chosen.storage or plan is best[plan.storage]]


def _table(plans: list[Plan]) -> Table:
    """A line a plan, narrow enough for 80 columns."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for head in ("", "storage", "compute", "blocks", "GPU", "host", "s/step", "s in all", "fidelity"):
        table.add_column(head, no_wrap=True, min_width=len(head) or 1)
    for place, plan in enumerate(plans):
        table.add_row(
            "*" if place == 0 else ("" if plan.fits else "x"),
            plan.storage,
            plan.compute,
            f"{plan.placement.resident_blocks}/{plan.blocks}",
            show_bytes(plan.peak_gpu_bytes),
            show_bytes(plan.host_bytes),
            f"{plan.step_seconds:.3g}",
            f"{plan.total_seconds:.3g}",
            show(plan.fidelity),
        )
    return table


def whys(plans: list[Plan]) -> list[str]:
    """Why each plan but the first was not chosen, and how its text encoders are kept."""
    return [
        f"  {plan.storage} {plan.placement.resident_blocks}/{plan.blocks}, text {plan.text_storage} "
        f"{plan.placement.text}: {'; '.join(plan.reasons)}"
        for plan in plans[1:]
    ]


def drawing(phases: Mapping[str, Mapping[str, int]], gpu: int, reserve: int) -> list[str]:
    """A bar a phase, each character one part of BAR of the GPU, and what the characters stand for."""
    lines = [
        f"  {phase:8} |{bar(parts, gpu, reserve)}| {show_bytes(sum(parts.values()))}" for phase, parts in phases.items()
    ]
    used = dict.fromkeys(part for parts in phases.values() for part in parts)
    return [*lines, "  " + ", ".join(f"{MARKS[part]} {part}" for part in used) + ", . driver and libraries"]


def bar(parts: Mapping[str, int], gpu: int, reserve: int) -> str:
    """The parts side by side, free space, then the reserve; ends are rounded, so that nothing adds up to more."""
    text, done = "", 0
    for part, size in parts.items():
        done += size
        text += MARKS[part] * (round(done / gpu * BAR) - len(text))
    kept = round(reserve / gpu * BAR)
    return text[:BAR] + " " * max(0, BAR - kept - len(text)) + "." * min(kept, BAR - len(text[:BAR]))
