"""The JSON record of a benchmark: machine, versions, date, rows; one file a run, replaced whole."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from gossamer.errors import FileDamagedError, InvalidOptionError
from gossamer.pipeline.versions import versions


def machine(device: torch.device) -> dict[str, Any]:
    """What the rows were measured on."""
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu-{platform.machine()}"
    return {"name": chip, "device": device.type, "cpus": os.cpu_count(), "python": platform.python_version()}


def stamp(device: torch.device) -> dict[str, Any]:
    """Machine, versions and date, as every record begins."""
    return {
        "machine": machine(device),
        "versions": versions(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def record_path(folder: Path, benchmark: str, record: Mapping[str, Any]) -> Path:
    """`<benchmark>-<machine>-<date>.json` in a folder."""
    chip = re.sub(r"[^a-z0-9]+", "-", record["machine"]["name"].lower()).strip("-")
    return folder / f"{benchmark}-{chip}-{record['date']}.json"


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Replace the file whole, so that an interrupted run leaves the rows that were done. Its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", "utf-8")
    os.replace(part, path)


def read_resumed(path: Path, here: Mapping[str, Any]) -> dict[str, Any]:
    """A record to go on with, which has to begin as one would that was begun here, but for its date."""
    try:
        record: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise FileDamagedError(
            f"The record {path} cannot be read.", str(error), "Leave --resume out to begin a new one."
        ) from error
    different = [key for key in here if key not in ("date", "rows") and record.get(key) != here[key]]
    if different:
        raise InvalidOptionError(
            f"The record {path} cannot be resumed here.",
            f"Other {' and '.join(different)} there: {[record.get(key) for key in different]}.",
            "Rows of one record come from one machine with one set of versions; begin a new one.",
        )
    return record
