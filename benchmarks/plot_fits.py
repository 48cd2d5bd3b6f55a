"""The tables, the promises and the plot of a `fits` record.

    PYTHONPATH=src python benchmarks/plot_fits.py RECORD.json --plot docs/images/fits.svg

Prints Markdown: every row, predicted beside actual, and what was promised. The plot is the time of a step over the GPU
memory that was given, ours by storage format and diffusers' ways as points at the memory that they took.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.bench.markdown import table

Row = Mapping[str, Any]
Rows = Mapping[str, Row]

BUS_SHARE = 1.10  # a step may be so many times the larger of computing and copying
COLOURS = {"nf4": "#2a6f97", "Q8_0": "#e09f3e", "fp8": "#6a994e", "bf16": "#9e2a2b"}
PEER_COLOUR = "#6c757d"


@dataclass(frozen=True)
class Promise:
    """A figure of some rows that is to be at most, or at least, a bound; None where the rows are not there."""

    words: str
    value: Callable[[Rows], float | None]
    bound: float
    at_least: bool = False

    def kept(self, value: float) -> bool:
        """Whether a value keeps it."""
        return value >= self.bound if self.at_least else value <= self.bound


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("--plot", type=Path, help="where to draw; the ending says as what (.svg, .png)")
    options = parser.parse_args()
    record = json.loads(options.record.read_text("utf-8"))
    rows = {row["name"]: row for row in record["rows"] if "error" not in row}
    print(row_table(rows))
    print(promise_table(rows))
    for row in record["rows"]:
        if "error" in row:
            print(f"\n{row['name']} failed: {row['error']}")
    if options.plot:
        draw(rows, caption(record), options.plot)


# promises -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A way of diffusers to offload, the row of ours beside it, and how many times as long its step is to be."""

    kind: str
    storage: str
    ours: str
    least: float

    @property
    def steps(self) -> str:
        """The row with steps of its transformer alone."""
        return f"diffusers-{self.kind}/{self.storage}"

    @property
    def picture(self) -> str:
        """The row with whole pictures."""
        return f"diffusers-{self.kind}-picture/{self.storage}"


WAYS = (
    Way("sequential", "bf16", "nf4/2GB", 20.0),
    Way("group", "bf16", "nf4/2GB", 3.0),
    Way("model", "Q8_0", "Q8_0/12GB", 2.0),
)


def promises() -> Iterator[Promise]:
    """What the whole is to keep, in the order of its issue."""
    yield Promise("nf4 in 6 GB: peak, GB", gigabytes("nf4/6GB", "peak_bytes"), 5.6)
    yield Promise("nf4 in 6 GB: picture over that of `free`", ratio("nf4/6GB", "nf4/free", "picture_seconds"), 1.25)
    for storage in ("nf4", "nf4-dq"):
        yield Promise(f"{storage} streamed: peak beside the VAE, GB", beside_the_vae(f"{storage}/streamed"), 1.5)
        step = ratio(f"{storage}/streamed", f"{storage}/free", "step_seconds")
        yield Promise(f"{storage} streamed: step over that of `free`", step, 1.12)
    yield Promise("Q8_0 in 4 GB: step over computing or copying", over_bus("Q8_0/4GB", "Q8_0/free"), BUS_SHARE)
    yield Promise("Q8_0 in 12 GB: blocks that stream", streamed("Q8_0/12GB"), 0)
    yield Promise("fp8 in 12 GB: blocks that stream", streamed("fp8/12GB"), 0)
    yield Promise("bf16 in 24 GB: blocks that stream", streamed("bf16/24GB"), 0)
    for way in WAYS:
        told = way.ours.replace("/", " in ").replace("GB", " GB")
        step = ratio(way.steps, way.ours, "step_seconds")
        yield Promise(f"{way.steps}: step over ours, {told}", step, way.least, True)
    for way in WAYS:
        peak = ratio(way.picture, way.ours, "peak_bytes")
        yield Promise(f"{way.picture}: peak over that of {way.ours}", peak, 1.0, True)
    yield Promise("plans compared", lambda rows: float(len(planned(rows))), 12, True)
    yield Promise("peak: worst distance from the prediction", worst("peak_bytes", "predicted_peak_bytes"), 0.05)
    yield Promise("step: worst distance from the prediction", worst("step_seconds", "predicted_step_seconds"), 0.20)
    yield Promise("pre-pass of 28 steps, s", figure("bf16/free", "prepass_seconds"), 0.3)


def figure(name: str, key: str) -> Callable[[Rows], float | None]:
    return lambda rows: rows[name].get(key) if name in rows else None


def gigabytes(name: str, key: str) -> Callable[[Rows], float | None]:
    def value(rows: Rows) -> float | None:
        found = figure(name, key)(rows)
        return None if found is None else found / 1e9

    return value


def beside_the_vae(name: str) -> Callable[[Rows], float | None]:
    """What everything took at most, in GB, but for the VAE's weights, which never leave."""

    def value(rows: Rows) -> float | None:
        if name not in rows or rows[name]["peak_bytes"] is None:
            return None
        return float(rows[name]["peak_bytes"] - rows[name]["gpu_bytes"]["denoise"]["VAE"]) / 1e9

    return value


def ratio(name: str, over: str, key: str) -> Callable[[Rows], float | None]:
    return lambda rows: rows[name][key] / rows[over][key] if name in rows and over in rows else None


def streamed(name: str) -> Callable[[Rows], float | None]:
    def value(rows: Rows) -> float | None:
        return float(rows[name]["plan"]["blocks"] - rows[name]["plan"]["resident_blocks"]) if name in rows else None

    return value


def over_bus(name: str, resident: str) -> Callable[[Rows], float | None]:
    """A step over the larger of the resident step and the time that the bus takes at the measured rate."""

    def value(rows: Rows) -> float | None:
        if name not in rows or resident not in rows:
            return None
        return rows[name]["step_seconds"] / max(rows[resident]["step_seconds"], rows[name]["bus_seconds"])

    return value


def worst(actual: str, predicted: str) -> Callable[[Rows], float | None]:
    def value(rows: Rows) -> float | None:
        found = [abs(row[actual] / row[predicted] - 1) for row in planned(rows).values() if row[actual] is not None]
        return max(found, default=None)

    return value


def planned(rows: Rows) -> dict[str, Row]:
    """Ours."""
    return {name: row for name, row in rows.items() if "plan" in row}


# tables ---------------------------------------------------------------------------------------------------------------


def row_table(rows: Rows) -> str:
    """One line a row."""
    head = [
        "row",
        "blocks",
        "text",
        "VAE",
        "peak, GB",
        "predicted",
        "reserved, GB",
        "driver, GB",
        "ms/step",
        "predicted",
    ]
    head += ["s a picture", "host, GB"]
    lines = []
    for name, row in rows.items():
        plan = row.get("plan", {})
        lines.append(
            [
                name,
                str(plan.get("resident_blocks", "")),
                plan.get("text", ""),
                plan.get("vae", ""),
                _cell(row, "peak_bytes", 1e-9, ".2f"),
                _cell(row, "predicted_peak_bytes", 1e-9, ".2f"),
                _cell(row, "reserved_bytes", 1e-9, ".2f"),
                _cell(row, "driver_bytes", 1e-9, ".2f"),
                _cell(row, "step_seconds", 1000, ".1f"),
                _cell(row, "predicted_step_seconds", 1000, ".1f"),
                _cell(row, "picture_seconds", 1, ".2f"),
                _cell(row, "host_bytes", 1e-9, ".1f"),
            ]
        )
    return table(head, lines, words=(0, 2, 3))


def promise_table(rows: Rows) -> str:
    """Every promise whose rows are there."""
    lines = []
    for promise in promises():
        value = promise.value(rows)
        if value is not None:
            bound = f"{'at least' if promise.at_least else 'at most'} {promise.bound:g}"
            lines.append([promise.words, f"{value:.3f}", bound, "kept" if promise.kept(value) else "**missed**"])
    return table(["what", "measured", "promised", ""], lines, words=(0, 3))


def _cell(row: Row, key: str, factor: float, form: str) -> str:
    return format(row[key] * factor, form) if row.get(key) is not None else ""


# the plot -------------------------------------------------------------------------------------------------------------


def caption(record: Mapping[str, Any]) -> str:
    """What was measured, where and with what."""
    return (
        f"{record['workload']}, random weights, whole pipeline; {record['machine']['name']}, "
        f"torch {record['versions']['torch']}, diffusers {record['versions']['diffusers']}, {record['date']}"
    )


def draw(rows: Rows, title: str, path: Path) -> None:
    """A line a storage format over the budgets; a cross for each of diffusers' ways, at the peak that it took."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure_, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for storage, colour in COLOURS.items():
        named = {name: row for name, row in planned(rows).items() if row["storage"] == storage}
        own = [row for name, row in named.items() if row["limit_bytes"] and not name.endswith("streamed")]
        points = sorted((row["budget_bytes"] / 1e9, row["step_seconds"] * 1000) for row in own)
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=f"gossamer, {storage}")
    for name, row in rows.items():
        if "plan" not in row and row["peak_bytes"]:
            place = (row["peak_bytes"] / 1e9, row["step_seconds"] * 1000)
            axes.plot(*place, marker="x", markersize=9, color=PEER_COLOUR)
            axes.annotate(name, place, (6, 4), textcoords="offset points", fontsize=8, color=PEER_COLOUR)
    axes.set_yscale("log")
    axes.set_xlabel("GPU memory, GB (ours: the budget of the whole process; diffusers: what was allocated)")
    axes.set_ylabel("ms a step")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure_.suptitle(title, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure_.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
