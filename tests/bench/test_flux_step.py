"""The benchmark as a command, on three small blocks; and what it does where a row fails."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gossamer.bench.random_flux import tiny
from gossamer.bench.record import read_resumed
from gossamer.bench.timing import Repeats
from gossamer.errors import InvalidOptionError, UnknownOptionError
from gossamer.models.flux_spec import SENSITIVE

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LABELS = {"system", "compiled", "storage", "compute", "adapters"}
MEASURED = {
    "step_ms",
    "step_ms_min",
    "step_ms_max",
    "prepass_ms",
    "peak_bytes",
    "weight_bytes",
    "first_call_seconds",
    "relative_error",
}


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import flux_step
    import flux_step_cases
    import flux_step_rows
    import plot_flux_step
    import speed_tables

    made = {"main": flux_step, "cases": flux_step_cases, "rows": flux_step_rows, "plot": plot_flux_step}
    return SimpleNamespace(**made, tables=speed_tables)


@pytest.fixture
def run(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def command(*arguments: str) -> dict[str, Any]:
        always = ["flux_step.py", "--quick", "--steps", "2", "--warmup", "0", "--settle", "0", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [*always, *arguments])
        modules.main.main()
        (path,) = tmp_path.glob("flux_step-cpu-*.json")
        return json.loads(path.read_text("utf-8"))

    return command


# the command ----------------------------------------------------------------------------------------------------------


def test_the_record_of_a_run_and_of_one_that_goes_on(run, tmp_path):
    rows = "gossamer/bf16/bf16/none,diffusers/bf16/bf16/none,torchao/fp8/fp8/none,gossamer/nf4/bf16/4xr16"
    first = run("--one-process", "--rows", rows)
    assert set(first) == {"machine", "versions", "date", "workload", "rows"}
    ours, adapted, diffusers, torchao = first["rows"]
    for row in (ours, adapted, diffusers):
        assert set(row) == LABELS | MEASURED
        assert 0 < row["step_ms_min"] <= row["step_ms"] <= row["step_ms_max"]
        assert row["peak_bytes"] is row["weight_bytes"] is None, "nobody counts the memory of a CPU run"
    assert ours["relative_error"] < 1.1 * diffusers["relative_error"] < 0.02
    assert adapted["relative_error"] < 0.3, "four adapters change the result by more than this if they are left out"
    assert set(torchao) == LABELS | {"error"}, "it needs a GPU, and says so"

    (path,) = tmp_path.glob("*.json")
    both = "gossamer/bf16/bf16/none,gossamer/int8/bf16/r16"
    second = run("--resume", str(path), "--rows", both)
    assert second["rows"][:4] == first["rows"], "what was measured is not measured again"
    assert [row["storage"] for row in second["rows"][4:]] == ["int8"]


def test_without_a_gpu_the_full_size_is_refused(modules, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["flux_step.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidOptionError, match="no GPU"):
        modules.main.main()


# rows -----------------------------------------------------------------------------------------------------------------


def test_every_row_has_a_name_of_its_own(modules):
    names = modules.cases.row_names()
    assert len(set(names)) == len(names)
    expected = [
        modules.rows.name_of(modules.rows.labels(case, kind))
        for case in modules.cases.CASES
        for kind in ("none", "r16", "r64", "4xr16")
    ]
    assert names == expected
    assert "torchao+compile/fp8/fp8/none" in names


def test_patterns_choose_rows(modules):
    plan = modules.main.planned(["gossamer/nf4/*/r16", "gguf/Q?_K/*/none"])
    chosen = [case.row_name(kind) for case, kinds in plan for kind in kinds]
    assert {"gossamer/nf4/bf16/r16", "gguf/Q4_K/bf16/none", "gguf/Q6_K/bf16/none"} <= set(chosen)
    assert all(name.startswith(("gossamer/nf4/", "gguf/Q")) for name in chosen)
    with pytest.raises(UnknownOptionError, match="xformers"):
        modules.main.planned(["xformers/*"])


def test_a_record_of_another_machine_is_not_resumed(modules, tmp_path):
    work = tiny(torch.device("cpu"))
    record = modules.main.fresh(work)
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record))
    assert read_resumed(path, modules.main.fresh(work)) == record
    path.write_text(json.dumps({**record, "versions": {**record["versions"], "torch": "1.0"}}))
    with pytest.raises(InvalidOptionError, match="versions"):
        read_resumed(path, modules.main.fresh(work))


class FailsOnce:
    """Builds a real model, and fails the first time it is asked."""

    def __init__(self, build: Any) -> None:
        self.build, self.asked = build, 0

    def __call__(self, work: Any) -> Any:
        self.asked += 1
        if self.asked == 1:
            raise RuntimeError("no kernel image")
        return self.build(work)


def failing(modules: SimpleNamespace, system: str, tmp_path: Path) -> tuple[Any, Any]:
    case = modules.cases.Case(system, "bf16", "bf16", FailsOnce(modules.cases.peers.plain))
    bench = modules.rows.Bench(tiny(torch.device("cpu")), Repeats(0, 1), tmp_path)
    modules.rows.keep_reference(bench, "r16")
    return case, bench


def test_a_peer_that_fails_leaves_its_error_and_the_next_row_is_measured(modules, tmp_path):
    case, bench = failing(modules, "diffusers", tmp_path)
    broken, sound = modules.rows.rows_of(case, ["none", "r16"], bench)
    assert broken["error"] == "RuntimeError: no kernel image"
    assert sound["relative_error"] < 0.02


def test_a_failure_of_our_own_ends_the_run(modules, tmp_path):
    case, bench = failing(modules, modules.cases.OURS, tmp_path)
    with pytest.raises(RuntimeError, match="no kernel image"):
        next(modules.rows.rows_of(case, ["none"], bench))


def test_a_peer_whose_process_dies_leaves_rows_that_say_so(modules, monkeypatch, run):
    monkeypatch.setattr(modules.main.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=-11))
    record = run("--rows", "bitsandbytes/nf4/bf16/r*,gguf/Q8_0/bf16/none")
    assert [row["adapters"] for row in record["rows"]] == ["r16", "r64", "none"]
    assert {row["error"] for row in record["rows"]} == {"its process ended with code -11"}
    with pytest.raises(SystemExit) as ended:
        run("--rows", "gossamer/bf16/bf16/none,gguf/Q8_0/bf16/none")
    assert ended.value.code == -11


def test_gguf_peer_decodes_the_bytes_that_we_pack(modules, tmp_path, monkeypatch):
    """With our modulation in the same format as the peer's: at 8 bits, as it usually is, it would be nearer."""

    def same_format(choice, stored):
        return {**dict.fromkeys(SENSITIVE, stored), "*": choice.transformer}

    monkeypatch.setattr(modules.cases, "storage_plan", same_format)
    work = tiny(torch.device("cpu"))
    bench = modules.rows.Bench(work, Repeats(0, 1), tmp_path)
    modules.rows.keep_reference(bench, "r16")
    chosen = [case for case in modules.cases.CASES if case.storage == "Q4_K"]
    errors = {case.system: next(modules.rows.rows_of(case, ["r16"], bench))["relative_error"] for case in chosen}
    assert errors["gguf"] == pytest.approx(errors["gossamer"], rel=0.1)


# tables ---------------------------------------------------------------------------------------------------------------


def record_rows(modules: SimpleNamespace, times: dict[str, float | None]) -> dict[str, Any]:
    rows = {}
    for name, time in times.items():
        system, storage, compute, kind = name.split("/")
        labels = {"storage": storage, "compute": compute, "adapters": kind}
        row = {"system": re.split("[+-]", system)[0], "compiled": "+" in system, **labels}
        row |= {"copies": False} if "-" in system else {}
        row |= {"error": "no"} if time is None else {**dict.fromkeys(MEASURED, 1e9), "step_ms": time}
        assert modules.rows.name_of(row) == name
        rows[name] = row
    return rows


def test_tables_show_failures_and_hold_promises_against_the_record(modules):
    times = {
        "gossamer/fp8/fp8/none": 74.0,
        "gossamer/fp8/fp8/r16": 77.0,
        "torchao+compile/fp8/fp8/none": 100.0,
        "torchao+compile/fp8/fp8/r16": None,
        "gossamer-copies/fp8/fp8/none": 75.0,
        "gossamer-copies/fp8/fp8/r16": 81.0,
    }
    rows = record_rows(modules, times)
    table = modules.plot.model_table(rows).splitlines()
    assert table[2].startswith("| **gossamer/fp8/fp8** | 74.0 | 77.0 |")
    assert table[3].startswith("| **gossamer-copies/fp8/fp8** | 75.0 | 81.0 |")
    assert table[4].startswith("| torchao+compile/fp8/fp8 | 100.0 | fails |")
    promises = modules.plot.promise_table(rows)
    assert "| gossamer/fp8/fp8/none | torchao+compile/fp8/fp8/none | 0.740 | 0.75 | kept |" in promises
    assert "| gossamer/fp8/fp8/r16 | gossamer/fp8/fp8/none | 1.041 | 1.03 | **missed** |" in promises
    assert "copies" not in promises
    described = {"rows": list(rows.values()), "versions": {}, "machine": {"name": "card"}, "date": "today"}
    of_docs = modules.tables.step_table(described)
    assert "| **gossamer** fp8 -> fp8 | 74.0 | 77.0 |  |  | 1.0 | 1.00 | 1.00 | 1000000000.000 |" in of_docs
    assert "| **gossamer**, no copies, fp8 -> fp8 | 75.0 | 81.0 |" in of_docs
