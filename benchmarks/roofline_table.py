"""Predicted times of FLUX.1-dev on every known card, as a table, and the calibration that the predictions rest on.

    python benchmarks/roofline_table.py                             prints the table
    python benchmarks/roofline_table.py --write docs/planning.md    puts it where the file has room for it
    python benchmarks/roofline_table.py --calibrate benchmarks/results/flux_step-RECORD.json

Nothing is measured here. A file has room between `<!-- NAME: begin -->` and `<!-- NAME: end -->` for the tables NAME:
`roofline`, `efficiency`. `--calibrate` takes the step times of our own rows from a `flux_step` record of the card that
`src/gossamer/memory/measured.json` names, and writes them into that file.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gossamer.bench.markdown import table
from gossamer.errors import InvalidOptionError
from gossamer.memory.budget import Budget
from gossamer.memory.card import Card
from gossamer.memory.card_table import CARDS
from gossamer.memory.cards import find_card
from gossamer.memory.efficiency import JOB, MEASURED, factors, modulated_bytes, read_measured
from gossamer.memory.fidelity import show
from gossamer.memory.model_specs import DEV
from gossamer.memory.plan import plan
from gossamer.memory.request import Plan, PlanRequest
from gossamer.memory.subject import known_subject

HOST_BYTES = 32 * 10**9
# where shares of attention are from that `measured.json` does not hold
ATTENTION = {
    "flash": "assumed after arXiv 2307.08691",
    "efficient": "assumed after arXiv 2307.08691",
    "flash on Hopper": "310 TFLOP/s on one H200, first trial",
}
NAMED = ("nf4", "Q8_0", "bf16")  # the columns with a format of the reader's own
RUN_STEPS = 28  # of the run whose pre-pass `flux_step` spreads over its steps
PLACE = re.compile(r"<!-- (?P<name>[\w-]+): begin -->\n(?P<old>.*?)<!-- (?P=name): end -->\n", re.DOTALL)


def main() -> None:
    options = parser().parse_args()
    if options.calibrate:
        calibrate(options.calibrate)
    if options.write:
        write(options.write)
    if not (options.calibrate or options.write):
        sys.stdout.write(roofline_table())


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--write", type=Path, metavar="FILE", help="a Markdown file with room for the tables")
    made.add_argument("--calibrate", type=Path, metavar="RECORD", help="a flux_step record to take step times from")
    return made


# tables ---------------------------------------------------------------------------------------------------------------


def roofline_table() -> str:
    """One row a card: the chosen plan, and a step with each format of NAMED."""
    head = ["card", "GB", "chosen", "blocks", "s/step", "s for 20 steps", *(f"{name}, s/step" for name in NAMED)]
    notes = (
        "\nPredicted, not measured: FLUX.1-dev, "
        f"{JOB.width}x{JOB.height}, {JOB.steps} steps, batch 1, "
        f"{HOST_BYTES // 10**9} GB of host memory.\nChosen: storage of the transformer, the likeness of the coarsest "
        "part in dB\n(text encoders included), type of the products; blocks: those of 57 that stay on the GPU.\n"
        "The last columns: a step with that format, as many blocks resident as fit; - where no plan fits.\n"
    )
    return table(head, map(cells, CARDS)) + notes


def cells(card: Card) -> list[str]:
    chosen = planned(card, None)
    own = f"{card.name}", f"{card.memory_bytes / 1e9:.1f}"
    steps = [seconds(planned(card, name)) for name in NAMED]
    if chosen is None:
        return [*own, "-", "-", "-", "-", *steps]
    words = f"`{chosen.storage}` ({show(chosen.fidelity)}), {chosen.compute}"
    blocks = str(chosen.placement.resident_blocks)
    return [*own, words, blocks, seconds(chosen), f"{chosen.total_seconds:.3g}", *steps]


def planned(card: Card, storage: str | None) -> Plan | None:
    budget = Budget(card.memory_bytes, HOST_BYTES)
    request = PlanRequest(known_subject(DEV), card, budget, JOB, storage=storage)
    try:
        return plan(request).chosen
    except InvalidOptionError:
        return None


def seconds(found: Plan | None) -> str:
    return "-" if found is None else f"{found.step_seconds:.3g}"


def efficiency_table() -> str:
    """Every factor, what it is of, and where it is from."""
    measured = read_measured()
    found = factors(measured)
    source = measured["source"].partition(",")[0]
    rows = [
        *([f"{name} products", f"{share:.3f}", f"peak in {name}", source] for name, share in found.products.items()),
        *(
            [f"{name} attention", f"{share:.3f}", "peak in 16 bits", ATTENTION.get(name, source)]
            for name, share in found.attention.items()
        ),
        ["pointwise", f"{found.pointwise:.3f}", "bandwidth", source],
        ["modulation", f"{found.modulation:.3f}", "bandwidth", source],
        *([f"decoding as {name}", f"{share:.3f}", "bandwidth", source] for name, share in found.decode.items()),
        ["host to GPU", f"{found.bus:.3f}", "bus", measured["bus_source"]],
        ["step over its kernels", f"{found.overhead:.3f}", "time", source],
        ["VAE convolutions", f"{found.convolutions:.3f}", "peak in 16 bits", "assumed"],
    ]
    return table(["what", "share", "of", "from"], rows)


TABLES: dict[str, Callable[[], str]] = {"roofline": roofline_table, "efficiency": efficiency_table}


def write(path: Path) -> None:
    """Make the tables of a file anew; what is between other marks stays."""

    def made(match: re.Match[str]) -> str:
        name = match["name"]
        text = TABLES[name]() if name in TABLES else match["old"]
        return f"<!-- {name}: begin -->\n{text}<!-- {name}: end -->\n"

    path.write_text(PLACE.sub(made, path.read_text("utf-8")), "utf-8")


# calibration ----------------------------------------------------------------------------------------------------------


def calibrate(path: Path, target: Path = MEASURED) -> None:
    """Replace the step times in the file of measured figures by those of a record."""
    record, measured = json.loads(path.read_text("utf-8")), read_measured(target)
    card = find_card(record["machine"]["name"])
    if card.name != find_card(measured["card"]).name:
        raise InvalidOptionError(
            f"{path} was measured on an {card.name}.",
            f"The times of single kernels in {MEASURED.name} are those of an {measured['card']}; factors of two cards "
            "cannot be mixed.",
            "Calibrate from a record of the same card, or measure the kernels on the new one as well.",
        )
    steps = {name: value for row in record["rows"] for name, value in step_times(row)}
    measured["steps_ms"] = {**measured["steps_ms"], **steps}
    measured["source"] = f"{path.name}, with the kernel times of {measured['source'].removeprefix(path.name + ', ')}"
    target.write_text(json.dumps(measured, indent=1) + "\n", "utf-8")


def step_times(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The row's name and its step with the modulation in every step, as in all of the file: the record has its share of
    a run's pre-pass in a step instead.
    """
    if row["system"] != "gossamer" or "error" in row or row["adapters"] not in ("none", "r16", "r64"):
        return
    own = row["step_ms"] - row["prepass_ms"] / RUN_STEPS
    yield f"{row['storage']}/{row['compute']}/{row['adapters']}", own + modulation_ms(row["storage"])


def modulation_ms(storage: str) -> float:
    """What the modulation adds to a step, by the factors that are in use."""
    card, found = find_card(read_measured()["card"]), factors(read_measured())
    return modulated_bytes(storage) / (found.modulation * card.bandwidth) * found.overhead * 1000


if __name__ == "__main__":
    main()
