"""The table, the promises and the plot of a `flux_step` record.

    PYTHONPATH=src python benchmarks/plot_flux_step.py RECORD.json --plot docs/flux_step.svg

Prints two Markdown tables: every model, and our times over the peers' beside what was promised.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux_step_cases import OURS, STORAGES
from flux_step_rows import name_of
from gossamer.bench.markdown import table
from gossamer.bench.random_flux import ADAPTERS

Rows = Mapping[str, Mapping[str, Any]]

BEST_PEER = "torchao+compile/fp8/fp8"
OUR_COLOUR, PEER_COLOUR, ADAPTER_COLOUR = "#2a6f97", "#b0b7bd", "#e09f3e"


@dataclass(frozen=True)
class Promise:
    """The step time of one row over another's is to be at most this."""

    ours: str
    over: str
    at_most: float


def promises(computes: Sequence[str]) -> Iterator[Promise]:
    """All promises about step times, for the compute types that a record has rows of."""
    yield Promise("gossamer/fp8/fp8/none", f"{BEST_PEER}/none", 0.75)
    yield Promise("gossamer/nf4/fp8/none", f"{BEST_PEER}/none", 0.82)
    yield Promise("gossamer/Q4_K/fp8/none", f"{BEST_PEER}/none", 0.82)
    yield Promise("gossamer/nf4/fp8/none", "bitsandbytes/nf4/bf16/none", 0.42)
    yield Promise("gossamer/Q8_0/bf16/none", "gguf/Q8_0/bf16/none", 0.53)
    yield Promise("gossamer/Q4_K/bf16/none", "gguf/Q4_K/bf16/none", 0.37)
    yield Promise("gossamer/Q6_K/bf16/none", "gguf/Q6_K/bf16/none", 0.33)
    yield Promise("gossamer/bf16/bf16/none", "diffusers+compile/bf16/bf16/none", 0.93)
    for compute in computes:
        yield Promise(f"gossamer/int8/{compute}/none", "bitsandbytes/int8/int8/none", 0.50)
    for storage in STORAGES:
        for compute in computes:
            for kind, at_most in (("r16", 1.03), ("r64", 1.06), ("4xr16", 1.06)):
                model = f"gossamer/{storage}/{compute}"
                yield Promise(f"{model}/{kind}", f"{model}/none", at_most)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("--plot", type=Path, help="where to draw; the ending says as what (.svg, .png)")
    options = parser.parse_args()
    record = json.loads(options.record.read_text("utf-8"))
    rows = {name_of(row): row for row in record["rows"]}
    print(model_table(rows))
    print(promise_table(rows))
    if options.plot:
        draw(rows, caption(record), options.plot)


# tables ---------------------------------------------------------------------------------------------------------------


def models(rows: Rows) -> list[str]:
    """`system/storage/compute` of every model that has a row, the fastest without adapters first, failures last."""
    names = list(dict.fromkeys(name.rpartition("/")[0] for name in rows))
    return sorted(names, key=lambda model: step_ms(rows, f"{model}/none") or float("inf"))


def step_ms(rows: Rows, name: str) -> float | None:
    """The median of a row; None where it is missing or failed."""
    return rows[name].get("step_ms") if name in rows else None


def model_table(rows: Rows) -> str:
    """One line a model: step times by adapters, then what holds without any."""
    head = ["model (storage/compute)", *(f"{kind}, ms" for kind in ADAPTERS)]
    head += ["weights, GB", "beyond, GB", "first call, s", "error"]
    lines = []
    for model in models(rows):
        times = [cell(rows.get(f"{model}/{kind}"), "step_ms", 1, ".1f") for kind in ADAPTERS]
        bare = rows.get(f"{model}/none")
        rest = [cell(bare, "weight_bytes", 1e-9, ".1f"), cell(bare, "peak_bytes", 1e-9, ".2f")]
        rest += [cell(bare, "first_call_seconds", 1, ".1f"), cell(bare, "relative_error", 1, ".4f")]
        name = f"**{model}**" if model.startswith(OURS) else model
        lines.append([name, *times, *rest])
    return table(head, lines)


def promise_table(rows: Rows) -> str:
    """Our time over the other's beside the promise, for every promise whose two rows are there."""
    computes = list(dict.fromkeys(row["compute"] for row in rows.values() if row["system"] == OURS))
    lines = []
    for promise in promises(computes):
        ours, over = step_ms(rows, promise.ours), step_ms(rows, promise.over)
        if ours is not None and over is not None:
            verdict = "kept" if ours / over <= promise.at_most else "**missed**"
            lines.append([promise.ours, promise.over, f"{ours / over:.3f}", f"{promise.at_most:.2f}", verdict])
    return table(["row", "over", "ratio", "at most", ""], lines, words=(0, 1, 4))


def cell(row: Mapping[str, Any] | None, key: str, factor: float, form: str) -> str:
    """A number of a row in a table: empty where nobody counted it, or there is no row."""
    if row is None:
        return ""
    if "error" in row:
        return "fails"
    return "" if row[key] is None else format(row[key] * factor, form)


# the plot -------------------------------------------------------------------------------------------------------------


def caption(record: Mapping[str, Any]) -> str:
    """What was measured, where and with what."""
    return (
        f"{record['workload']}, random weights, one denoising step; {record['machine']['name']}, "
        f"torch {record['versions']['torch']}, diffusers {record['versions']['diffusers']}, {record['date']}"
    )


def draw(rows: Rows, title: str, path: Path) -> None:
    """A bar a model, the fastest on top; what an adapter of rank 16 adds is the bar's second part."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [model for model in models(rows) if step_ms(rows, f"{model}/none") is not None]
    bare = [step_ms(rows, f"{model}/none") or 0.0 for model in names]
    # an adapter that costs less than the spread of the times may seem to cost less than nothing
    adapted = [step_ms(rows, f"{model}/r16") for model in names]
    extra = [max(0.0, (with_one or without) - without) for with_one, without in zip(adapted, bare, strict=True)]
    colours = [OUR_COLOUR if model.startswith(OURS) else PEER_COLOUR for model in names]
    figure, axes = pyplot.subplots(figsize=(9, 0.8 + 0.3 * len(names)), layout="constrained")
    axes.barh(names, bare, color=colours)
    axes.barh(names, extra, left=bare, color=ADAPTER_COLOUR, label="what rank 16 on every block linear adds")
    for place, (without, more) in enumerate(zip(bare, extra, strict=True)):
        words = f"{without:.0f}" + (f" + {more:.0f}" if more else "")
        axes.annotate(words, (without + more, place), (4, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("ms a step")
    axes.legend(loc="upper right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
