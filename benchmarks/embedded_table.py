"""The Markdown tables of an `embedded_model` record, alone or put where README and docs have room for them.

    python benchmarks/embedded_table.py benchmarks/results/embedded_model-nvidia-h200-2026-11-20.json
    python benchmarks/embedded_table.py RECORD.json --seconds RECORD.json --reader RECORD.json --write README.md

A file has room for the table NAME between the lines `<!-- NAME: begin -->` and `<!-- NAME: end -->`. Everything between
them is made anew; a name that is not known here is left alone.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gossamer.bench.markdown import table

Record = Mapping[str, Any]
Row = Mapping[str, Any]

REFERENCE, SHOWN = "fp32", ("fp32", "nf4")
AIMS = {"objects": 95.0, "relations": 90.0}  # per cent, at 20 steps
SHARES = ("objects", "relations", "exact")
COUNTS = {"1": "one object", "2": "two objects", "3": "three objects"}
GROUPS = {"alike": "two share a shape or a colour", "apart": "none share a shape or a colour"}
PLACE = re.compile(r"<!-- (?P<name>[\w-]+): begin -->\n(?P<old>.*?)<!-- (?P=name): end -->\n", re.DOTALL)


def storage_table(record: Record) -> str:
    """One row a storage format: bytes, likeness to fp32, adherence, each adapter's score."""
    names = adapters(record)
    head = ["storage", "MB", "PSNR, dB", "SSIM", *(f"{share}, %" for share in SHARES), *names]
    return table(head, (storage_cells(row, names) for row in record["rows"]))


def storage_cells(row: Row, names: Sequence[str]) -> list[str]:
    like, graded = row["likeness"], row["adherence"]
    return [
        f"`{row['storage']}`",
        f"{row['weight_bytes'] / 1e6:.2f}",
        decibels(like),
        f"{like['ssim_mean']:.4f}",
        *(percent(graded[share]) for share in SHARES),
        *(f"{row['adapters'][name]['with']:.2f}" for name in names),
    ]


def storage_notes(record: Record) -> str:
    """What the columns of the storage table mean, with the machine and the figures behind them."""
    settings, machine, versions = record["settings"], record["machine"], record["versions"]
    without = ", ".join(f"{name} {span(record, name)}" for name in adapters(record))
    return (
        f"{settings['captions']} held-out captions, {settings['steps']} steps, guidance {settings['guidance']:g}, on "
        f"one {machine['name']}, {record['date']}, torch {versions['torch']}.\n"
        "MB: all weights of the transformer. PSNR and SSIM: means against the fp32 pictures. Objects: shape and\n"
        "colour right; exact: the whole scene right. Last columns: the style score (pencil, neon) or the agreement\n"
        f"with the edge map (edges), 0 to 1, over {settings['adapter_captions']} captions with the adapter attached. "
        f"Without it: {without}.\n"
    )


def span(record: Record, name: str) -> str:
    """The scores of the pictures without an adapter, over all formats."""
    found = sorted({f"{row['adapters'][name]['without']:.2f}" for row in record["rows"]})
    return found[0] if len(found) == 1 else f"{found[0]} to {found[-1]}"


def count_table(record: Record) -> str:
    """Adherence by number of objects, for the reference and the demo's format."""
    rows = [row for row in record["rows"] if row["storage"] in SHOWN]
    head = ["scenes of", *(f"{row['storage']}: {share}, %" for row in rows for share in SHARES)]
    lines = [
        [COUNTS[count], *(percent(row["adherence"]["by_count"][count][share]) for row in rows for share in SHARES)]
        for count in COUNTS
        if count in rows[0]["adherence"]["by_count"]
    ]
    lines.append(["all", *(percent(row["adherence"][share]) for row in rows for share in SHARES)])
    return table(head, lines)


def aims(record: Record) -> str:
    """How far each shown format is from what was aimed at."""
    lines = []
    for row in record["rows"]:
        if row["storage"] in SHOWN:
            graded = row["adherence"]
            said = [aim(share, graded[share], AIMS[share]) for share in AIMS if graded[share] is not None]
            lines.append(f"- `{row['storage']}`: {'; '.join(said)}.\n")
    return "".join(lines)


def aim(share: str, reached: float, wanted: float) -> str:
    short = wanted - reached
    verdict = "reached" if short <= 0 else f"{short:.1f} points short"
    return f"{reached:.1f} % of {share} (aim: {wanted:g} %, {verdict})"


def three_table(record: Record) -> str:
    """Scenes of three objects: two of them alike in shape or colour, or none."""
    rows = [row for row in record["rows"] if row["storage"] in SHOWN]
    measures = [f"{row['storage']}: {share}, %" for row in rows for share in SHARES]
    lines = [
        [
            words,
            str(rows[0]["three_objects"][group]["pictures"]),
            *(percent(row["three_objects"][group][share]) for row in rows for share in SHARES),
        ]
        for group, words in GROUPS.items()
        if group in rows[0]["three_objects"]
    ]
    return table(["three objects, of which", "pictures", *measures], lines)


def sweep_table(record: Record) -> str:
    """Adherence of the reference by steps and by guidance."""
    head = ["steps", "guidance", *(f"{share}, %" for share in SHARES), "objects of three, %"]
    return table(
        head,
        (
            [
                str(row["steps"]),
                f"{row['guidance']:g}",
                *(percent(row["adherence"][share]) for share in SHARES),
                percent(row["adherence"]["by_count"]["3"]["objects"]),
            ]
            for row in record["sweep"]
        ),
    )


def adapter_table(record: Record) -> str:
    """Each adapter's effect, and how far the format moves pictures with it and without any."""
    names = adapters(record)
    head = ["storage", "plain: dB", *(f"{name}: {what}" for name in names for what in ("effect", "dB"))]
    return table(head, (adapter_cells(row, names) for row in record["rows"]))


def adapter_cells(row: Row, names: Sequence[str]) -> list[str]:
    cells = [f"`{row['storage']}`", decibels(row["likeness"])]
    for name in names:
        measured = row["adapters"][name]
        cells += [f"{measured['with'] - measured['without']:+.2f}", decibels(measured["likeness"])]
    return cells


def seconds_table(record: Record) -> str:
    """Whole processes of `gossamer run`, by storage."""
    head = ["storage", "adapter", "seconds, median", "fastest", "slowest", "load before", "load after"]
    rows = ([f"`{row['storage']}`", row["lora"], *map("{:.1f}".format, seconds_figures(row))] for row in record["rows"])
    about = f"{record['threads']} threads, {record['machine']['name']}, {record['date']}"
    versions = f"torch {record['versions']['torch']}"
    return f"{table(head, rows)}\n{about}, {versions}. Load: programs that want a core, ours included.\n"


def seconds_figures(row: Row) -> list[float]:
    return [row["seconds_median"], row["seconds_min"], row["seconds_max"], *row["load"]]


def reader_share(record: Record) -> str:
    """How often the judge itself is right on rendered held-out scenes."""
    clean = record["validation"]["held-out side"]["clean"]
    return (
        f"On {clean['pictures']} rendered held-out scenes the reader gets {clean['objects']:.1f} % of the objects, "
        f"{clean['relations']:.1f} % of the relations\nand {clean['exact']:.1f} % of whole scenes right.\n"
    )


# shared


def adapters(record: Record) -> list[str]:
    """Names of the adapters, in the record's order."""
    return list(record["rows"][0]["adapters"])


def decibels(like: Mapping[str, Any]) -> str:
    """A mean PSNR; None where all pictures are the same."""
    return "same" if like["psnr_mean"] is None else f"{like['psnr_mean']:.1f}"


def percent(share: float | None) -> str:
    """None where there was nothing to get right."""
    return "" if share is None else f"{share:.1f}"


# places in files

EMBEDDED: Mapping[str, Callable[[Record], str]] = {
    "embedded-storage": lambda record: f"{storage_table(record)}\n{storage_notes(record)}",
    "embedded-counts": count_table,
    "embedded-aims": aims,
    "embedded-three": three_table,
    "embedded-sweep": sweep_table,
    "embedded-adapters": adapter_table,
}


def blocks(record: Record, seconds: Record | None = None, reader: Record | None = None) -> dict[str, str]:
    """Every table by the name of its place."""
    absent = {
        "embedded-sweep": "sweep" not in record,
        "embedded-three": any("three_objects" not in row for row in record["rows"]),
    }
    made = {name: make(record) for name, make in EMBEDDED.items() if not absent.get(name)}
    if seconds is not None:
        made["run-seconds"] = seconds_table(seconds)
    if reader is not None:
        made["reader-share"] = reader_share(reader)
    return made


def filled(text: str, made: Mapping[str, str]) -> str:
    """The text with every place whose table was made filled anew."""

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- {name}: begin -->\n{made.get(name, match['old'])}<!-- {name}: end -->\n"

    return PLACE.sub(fill, text)


def places(text: str) -> list[str]:
    """Names of the places in a text."""
    return [match["name"] for match in PLACE.finditer(text)]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="a record of benchmarks/embedded_model.py")
    parser.add_argument("--seconds", type=Path, metavar="RECORD", help="a record of benchmarks/run_seconds.py")
    parser.add_argument("--reader", type=Path, metavar="RECORD", help="the scene reader's record in training/results")
    parser.add_argument("--write", type=Path, nargs="+", default=[], metavar="FILE", help="fill the places in these")
    options = parser.parse_args(argv)
    extra = (options.seconds, options.reader)
    made = blocks(*(path and json.loads(path.read_text("utf-8")) for path in (options.record, *extra)))
    for path in options.write:
        text = path.read_text("utf-8")
        if not made.keys() & set(places(text)):
            sys.exit(f"{path} has no place for a table. The places are: {', '.join(made)}.")
        path.write_text(filled(text, made), "utf-8")
        print(f"{path}: {', '.join(name for name in places(text) if name in made)}")
    if not options.write:
        print("\n".join(made.values()), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
