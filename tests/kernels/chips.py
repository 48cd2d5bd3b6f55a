"""Chips that are not there, and the table of docs/backends.md made from them.

`python tests/kernels/chips.py` writes the table anew.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gossamer.kernels.capability import Capability
from gossamer.kernels.choice import choose

DOCS = Path(__file__).parent.parent.parent / "docs" / "backends.md"
BEGIN, END = "<!-- chips: begin -->\n", "<!-- chips: end -->\n"


def nvidia(name: str, major: int, minor: int) -> Capability:
    return Capability(
        kind="cuda",
        name=name,
        system="Linux",
        torch_version=(2, 13),
        compute_capability=(major, minor),
        cuda_version=(13, 0),
        cudnn_version=91900,
        triton="3.6.0",
        flash=True,
        memory_bytes=24 * 10**9,
    )


def without_triton(kind: str, name: str, system: str, flash: bool = False) -> Capability:
    return Capability(kind, name, system, (2, 13), triton_obstacle=f"no Triton for {kind}", flash=flash)


CHIPS = {
    "GTX 1080": nvidia("GTX 1080", 6, 1),
    "V100": nvidia("V100", 7, 0),
    "RTX 2080": nvidia("RTX 2080", 7, 5),
    "A100": nvidia("A100", 8, 0),
    "RTX 3090": nvidia("RTX 3090", 8, 6),
    "RTX 3090, no Triton": replace(nvidia("RTX 3090", 8, 6), triton=None, triton_obstacle="Triton is not installed"),
    "RTX 4090": nvidia("RTX 4090", 8, 9),
    "RTX 4090, Windows": replace(nvidia("RTX 4090", 8, 9), system="Windows"),
    "H200": nvidia("H200", 9, 0),
    "B200": nvidia("B200", 10, 0),
    "RTX 5090": nvidia("RTX 5090", 12, 0),
    "RTX 5090, Windows": replace(nvidia("RTX 5090", 12, 0), system="Windows"),
    "MI300X": without_triton("rocm", "MI300X", "Linux", flash=True),
    "Apple M4": without_triton("mps", "Apple arm64", "Darwin"),
    "CPU": without_triton("cpu", "x86_64", "Linux"),
}

SHOWN = ("bf16", "int8", "Q8_0", "nf4")


def chip_table() -> str:
    """What "auto" chooses on each chip: compute for some formats, and the backends for nf4, heads 128 wide.

    The last column is the attention where exact attention is asked for.
    """
    header = ["chip", "capability", *SHOWN, "decodes nf4", "product of nf4", "attention of nf4", "exact attention"]
    rows = [header, ["---"] * len(header)]
    for name, chip in CHIPS.items():
        choices = [choose(chip, storage) for storage in SHOWN]
        computes = [choice.compute for choice in choices]
        last = choices[-1]
        exact = choose(chip, SHOWN[-1], attention="exact")
        rows.append([name, chip.chip, *computes, last.decode, last.product, last.attention, exact.attention])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def with_table(text: str) -> str:
    """The page with the table between its two marks made anew."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + chip_table() + END + rest.split(END)[1]


if __name__ == "__main__":
    DOCS.write_text(with_table(DOCS.read_text()))
