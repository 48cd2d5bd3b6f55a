"""The benchmark of the pre-pass as a command on three small blocks, and how its rows are held to what was promised."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from gossamer.errors import InvalidOptionError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import prepass as module

    yield module
    del sys.modules["prepass"]


def test_the_record(benchmark, monkeypatch, tmp_path):
    always = ["prepass.py", "--quick", "--steps", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*always, "--models", "bf16/bf16,nf4/bf16"])
    benchmark.main()
    (path,) = tmp_path.glob("prepass-cpu-*.json")
    record = json.loads(path.read_text("utf-8"))
    assert {"machine", "versions", "date", "workload", "run_steps", "rows"} == record.keys()
    assert [(row["model"], row["modulation"]) for row in record["rows"]] == [
        (model, place) for model in ("bf16/bf16", "nf4/bf16") for place in ("resident", "prepass")
    ]
    for row in record["rows"]:
        assert row["step_ms"] > 0
        assert row["prepass_seconds"] > 0
        assert row["peak_bytes"] is row["allocated_bytes"] is None, "nobody counts the memory of a CPU run"
    for row in record["rows"][1::2]:
        assert row["relative_error"] < 1e-2
        assert row["host_bytes"] >= row["weight_bytes"] > 0


def test_both_promises_have_to_be_kept(benchmark):
    plain = {"peak_bytes": 30 * 10**9}

    def kept(peak, seconds):
        return benchmark.compared(plain, {"peak_bytes": peak, "prepass_seconds": seconds})

    assert kept(23 * 10**9, 0.2) == {"saved_bytes": 7 * 10**9, "kept": True}
    assert not kept(25 * 10**9, 0.2)["kept"]
    assert not kept(23 * 10**9, 0.4)["kept"]
    assert benchmark.compared({"peak_bytes": None}, {}) == {"saved_bytes": None, "kept": None}


def test_without_a_gpu_the_full_size_is_refused(benchmark, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prepass.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidOptionError, match="no GPU"):
        benchmark.main()
