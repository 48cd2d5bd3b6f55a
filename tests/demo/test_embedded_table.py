"""The tables of README and docs: made from a record by a command, and those in the tree from the record in the tree."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from gossamer.demo.embedded import adapter_paths, model_folder
from gossamer.demo.scene import Scene, Solid
from gossamer.pipeline.folder import component_hashes

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "docs" / "embedded-model.md")


@pytest.fixture
def modules(monkeypatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import embedded_grid
    import embedded_model
    import embedded_table
    import run_seconds

    return SimpleNamespace(grid=embedded_grid, table=embedded_table, model=embedded_model, seconds=run_seconds)


def shares(objects, relations, exact):
    return {"pictures": 4, "objects": objects, "relations": relations, "exact": exact, "extra": 0}


def adherence(objects, relations):
    by_count = {"1": shares(100.0, None, 100.0), "2": shares(99.5, 99.0, 98.0), "3": shares(objects, relations, 51.0)}
    return shares(objects, relations, 83.0) | {"by_count": by_count}


def row(storage, psnr, objects, relations, without):
    like = {"pictures": 4, "identical": 0, "psnr_mean": psnr, "ssim_mean": 0.98765}
    return {
        "storage": storage,
        "weight_bytes": 6_164_736,
        "likeness": like,
        "adherence": adherence(objects, relations),
        "three_objects": {"alike": shares(80.0, 70.0, 40.0), "apart": shares(99.0, 98.0, 97.0)},
        "adapters": {
            "pencil": {"without": 0.0, "with": 0.9, "likeness": like},
            "edges": {"without": without, "with": 0.85, "likeness": like},
        },
    }


@pytest.fixture
def record():
    return {
        "machine": {"name": "Chip", "device": "cuda"},
        "versions": {"torch": "2.11.0"},
        "date": "2026-11-20",
        "settings": {"captions": 4, "steps": 20, "guidance": 3.5, "adapter_captions": 2},
        "rows": [row("fp32", None, 96.04, 82.66, 0.22), row("nf4", 26.55, 89.5, 91.0, 0.24)],
        "sweep": [{"steps": 4, "guidance": 1.0, "adherence": adherence(87.7, 70.3)}],
    }


@pytest.fixture
def seconds():
    measured = {"lora": "pencil", "seconds_median": 7.04, "seconds_min": 6.9, "seconds_max": 8.0, "load": [0.04, 1.94]}
    return {
        "machine": {"name": "cpu"},
        "threads": 2,
        "versions": {"torch": "2.13.0"},
        "date": "2026-11-20",
        "rows": [{"storage": "nf4", **measured}],
    }


def test_the_tables(modules, record, seconds):
    reader = {"validation": {"held-out side": {"clean": shares(99.75, 99.02, 99.5)}}}
    made = modules.table.blocks(record, seconds, reader)
    assert "gets 99.8 % of the objects, 99.0 % of the relations\nand 99.5 % of whole" in made["reader-share"]
    lines = made["embedded-storage"].splitlines()
    assert lines[0].startswith(
        "| storage | MB | PSNR, dB | SSIM | objects, % | relations, % | exact, % | pencil | edges"
    )
    assert lines[2] == "| `fp32` | 6.16 | same | 0.9877 | 96.0 | 82.7 | 83.0 | 0.90 | 0.85 |"
    assert lines[3] == "| `nf4` | 6.16 | 26.6 | 0.9877 | 89.5 | 91.0 | 83.0 | 0.90 | 0.85 |"
    assert "4 held-out captions, 20 steps, guidance 3.5, on one Chip, 2026-11-20" in made["embedded-storage"]
    assert "pencil 0.00, edges 0.22 to 0.24" in made["embedded-storage"]
    assert "| one object | 100.0 |  | 100.0 | 100.0 |  | 100.0 |" in made["embedded-counts"]
    assert "| two share a shape or a colour | 4 | 80.0 | 70.0 | 40.0 | 80.0" in made["embedded-three"]
    assert "| 4 | 1 | 87.7 | 70.3 | 83.0 | 87.7 |" in made["embedded-sweep"]
    assert "| `nf4` | 26.6 | +0.90 | 26.6 | +0.61 | 26.6 |" in made["embedded-adapters"]
    assert made["run-seconds"].splitlines()[2] == "| `nf4` | pencil | 7.0 | 6.9 | 8.0 | 0.0 | 1.9 |"


def test_how_far_it_is_from_the_aims(modules, record):
    assert modules.table.blocks(record)["embedded-aims"].splitlines() == [
        "- `fp32`: 96.0 % of objects (aim: 95 %, reached); 82.7 % of relations (aim: 90 %, 7.3 points short).",
        "- `nf4`: 89.5 % of objects (aim: 95 %, 5.5 points short); 91.0 % of relations (aim: 90 %, reached).",
    ]


def test_a_record_of_a_short_run(modules, record):
    del record["sweep"], record["rows"][1]["three_objects"]
    assert set(modules.table.blocks(record)) == {
        "embedded-storage",
        "embedded-counts",
        "embedded-aims",
        "embedded-adapters",
    }


def test_only_places_of_tables_that_were_made_change(modules, record, tmp_path, capsys):
    (tmp_path / "record.json").write_text(json.dumps(record))
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- embedded-aims: begin -->\nold\n<!-- embedded-aims: end -->\nbetween\n"
        "<!-- run-seconds: begin -->\nkept\n<!-- run-seconds: end -->\nafter\n"
    )
    modules.table.main([str(tmp_path / "record.json"), "--write", str(page)])
    text = page.read_text()
    assert "old" not in text
    assert "7.3 points short" in text
    assert re.findall(r"^(?:before|between|kept|after)$", text, re.MULTILINE) == ["before", "between", "kept", "after"]
    modules.table.main([str(tmp_path / "record.json"), "--write", str(page)])
    assert page.read_text() == text
    page.write_text("no place\n")
    with pytest.raises(SystemExit, match="no place"):
        modules.table.main([str(tmp_path / "record.json"), "--write", str(page)])
    modules.table.main([str(tmp_path / "record.json")])
    assert "| storage |" in capsys.readouterr().out


def test_the_grid_with_captions(modules, tmp_path):
    Image.new("RGB", (96, 32), "red").save(tmp_path / "grid.png")
    texts = [{"caption": "a cone", "seed": 0, "adapter": None, "shows": "picture"}] * 6
    texts[1] = {**texts[1], "adapter": "edges", "shows": "control map"}
    texts[2] = {**texts[2], "adapter": "neon"}
    assert [modules.grid.label(about) for about in texts[:3]] == [
        "a cone",
        "edge map for the picture to the right",
        "[neon] a cone",
    ]
    (tmp_path / "grid.json").write_text(json.dumps(texts * 2))
    modules.grid.main([str(tmp_path / "grid.png"), "--out", str(tmp_path / "new" / "grid.jpg")])
    with Image.open(tmp_path / "new" / "grid.jpg") as sheet:
        assert sheet.width > 96
        assert sheet.height > 100
    (tmp_path / "grid.json").write_text(json.dumps(texts))
    with pytest.raises(ValueError, match="12 tiles"):
        modules.grid.main([str(tmp_path / "grid.png"), "--out", str(tmp_path / "grid.jpg")])


def test_seconds_of_whole_runs(modules, monkeypatch, seconds):
    times = iter([30.0, 3.0, 1.0, 2.0])
    monkeypatch.setattr(modules.seconds, "run_once", lambda storage, lora: next(times))
    measured = modules.seconds.measure("nf4", "pencil", runs=3)
    assert [measured[f"seconds_{name}"] for name in ("median", "min", "max")] == [2.0, 1.0, 3.0], "without the warm-up"
    assert "| `nf4` | pencil | 2.0 | 1.0 | 3.0 |" in modules.table.seconds_table(seconds | {"rows": [measured]})


def test_a_run_that_fails_ends_the_measurement(modules):
    with pytest.raises(SystemExit, match="There is no adapter called 'crayon'"):
        modules.seconds.run_once("nf4", "crayon")


def solids(*kinds):
    return Scene(tuple(Solid(shape, colour, "matte", "small", 0.0, 0.0) for shape, colour in kinds), (), "grey", "left")


def test_scenes_with_objects_that_are_alike(modules):
    alike = modules.model.alike
    assert not alike(solids(("cube", "red"), ("cone", "blue"), ("ring", "green")))
    assert alike(solids(("cube", "red"), ("cube", "blue"), ("ring", "green")))
    assert alike(solids(("cube", "red"), ("cone", "blue"), ("ring", "red")))


# what is in the tree


def records(name: str) -> set[str]:
    """The records that the pages say their tables are made from."""
    found = re.compile(rf"(?:benchmarks|training)/results/{name}-[\w-]+\.json")
    return {path for page in PAGES for path in found.findall(page.read_text("utf-8"))}


def load(path: str) -> dict[str, Any]:
    return json.loads((ROOT / path).read_text("utf-8"))


def test_the_pages_hold_what_their_records_say(modules):
    (embedded,), (seconds,), (reader,) = records("embedded_model"), records("run_seconds"), records("reader")
    made = modules.table.blocks(load(embedded), load(seconds), load(reader))
    for page in PAGES:
        text = page.read_text("utf-8")
        assert made.keys() & set(modules.table.places(text))
        assert modules.table.filled(text, made) == text, "see docs/embedded-model.md for the command"


def test_the_record_was_measured_with_the_shipped_files():
    (embedded,) = records("embedded_model")
    settings = load(embedded)["settings"]
    shipped = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in adapter_paths().items()}
    assert settings["adapters_sha256"] == shipped
    if "model_sha256" in settings:  # records from before 2026-11-20 do not have it
        assert settings["model_sha256"] == component_hashes(model_folder())


def test_the_grid_is_small_enough_for_a_readme():
    assert (ROOT / "docs" / "images" / "embedded-model.jpg").stat().st_size <= 400_000
