"""Each file of the benchmark of hostile files is refused, by an error of three parts; measuring sees what it should."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
REFUSED = {"file-damaged", "unknown-storage"}


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import hostile_files

    yield hostile_files
    del sys.modules["hostile_files"]


@pytest.mark.parametrize("kind", ["gguf", "safetensors", "encodings"])
def test_every_file_is_refused(benchmark, kind, tmp_path):
    path = tmp_path / ("file.gguf" if kind == "gguf" else "file.safetensors")
    names = set()
    for name, content, length in benchmark.CASES[kind]():
        names.add(name)
        path.write_bytes(content)
        if length:
            os.truncate(path, length)
        code, why = benchmark.outcome(path)
        assert code in REFUSED, name
        assert 0 < len(why) < 600, name
    assert len(names) > 15


def test_the_base_of_the_lies_is_sound(benchmark, tmp_path):
    for content in (benchmark.nf4({}), benchmark.comfy({"format": "float8_e4m3fn"})):
        (tmp_path / "file.safetensors").write_bytes(content)
        assert benchmark.outcome(tmp_path / "file.safetensors") == ("not refused", "")


def test_time_and_memory_are_measured(benchmark, tmp_path, monkeypatch):
    path = tmp_path / "file.safetensors"
    path.write_bytes(b"x")

    def greedy(_):
        bytearray(b"\1" * 60_000_000)
        sum(range(2_000_000))

    monkeypatch.setattr(benchmark, "read_safetensors", greedy)
    row = benchmark.measure("safetensors", ("a", b"x", 0), tmp_path, 2)
    assert row["code"] == "not refused"
    assert row["extra_bytes"] > 50_000_000
    assert row["cpu_seconds"] > 0
    assert not benchmark.is_bounded(row)
    monkeypatch.setattr(benchmark, "read_safetensors", lambda _: os._exit(9))
    assert benchmark.in_child(path)["code"] == "the process ended"


def test_the_record(benchmark, tmp_path, monkeypatch):
    few = list(benchmark.gguf_cases())[:2]
    monkeypatch.setitem(benchmark.CASES, "gguf", lambda: iter(few))
    monkeypatch.setattr(sys, "argv", ["hostile_files", "--only", "gguf", "--runs", "1", "--out", str(tmp_path)])
    assert benchmark.main() == 0
    (path,) = tmp_path.glob("hostile_files-*.json")
    record = json.loads(path.read_text())
    assert [row["file"] for row in record["rows"]] == [name for name, _, _ in few]
    assert {"machine", "versions", "date", "load", "bounds"} <= record.keys()
