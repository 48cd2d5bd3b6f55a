"""Predictions against what was measured, and how they must change with the work."""

import importlib.util
import json
from pathlib import Path

import pytest

from gossamer.errors import InvalidOptionError
from gossamer.memory.cards import find_card
from gossamer.memory.efficiency import JOB, MEASURED, factors, modulated_bytes, read_measured
from gossamer.memory.model_cost import transformer_bytes
from gossamer.memory.model_specs import FLUX_DEV
from gossamer.memory.offload_carousel import Arrangement
from gossamer.memory.picture import Job
from gossamer.memory.roofline import Machine, attention_seconds, prepass_seconds, step_seconds, streamed_seconds

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MEASURED_STEPS = read_measured()["steps_ms"]


def predicted_ms(row: str, found=None) -> float:
    storage, compute, adapters = row.split("/")
    machine = Machine(find_card("H200"), found or factors(read_measured()), compute, "bf16", "cudnn")
    rank = 0 if adapters == "none" else int(adapters[1:])
    weights = transformer_bytes(FLUX_DEV, storage)
    return step_seconds(machine, FLUX_DEV, JOB, weights, rank, modulation_resident=True) * 1000


@pytest.mark.parametrize("row", MEASURED_STEPS)
def test_what_was_measured_comes_out_again(row):
    """Each factor comes from other rows too, so agreement of all of them is not a matter of course."""
    assert predicted_ms(row) == pytest.approx(MEASURED_STEPS[row], rel=0.03)


def test_factors_are_shares_and_lie_within_what_was_measured():
    found = factors(read_measured())
    for share in (*found.products.values(), *found.attention.values(), *found.decode.values(), found.pointwise):
        assert 0 < share < 1
    card = find_card("H200")
    assert 1.19e15 < found.products["fp8"] * card.fp8 < 1.44e15
    assert 7.0e14 < found.products["bf16"] * card.bf16 < 7.85e14
    assert found.attention["cudnn"] * card.bf16 < 6.31e14  # alone it reached that; in a step the chip is warmer
    assert found.bus * card.bus == pytest.approx(55e9)


def test_streaming_takes_as_long_as_it_did():
    """On one H200, 4-bit block weights from pinned memory in two slots: 99.6 ms, and 90.6 with all of them there."""
    machine = Machine(find_card("H200"), factors(read_measured()), "fp8", "bf16", "cudnn")
    blocks = transformer_bytes(FLUX_DEV, "nf4").blocks
    two = Arrangement(frozenset(), 2)
    assert streamed_seconds(machine, 0.0906, blocks, two, pinned=True) == pytest.approx(0.0996, rel=0.05)
    assert streamed_seconds(machine, 0.0906, blocks, Arrangement(frozenset(range(57)), 2), pinned=True) == 0.0906


def test_a_slow_bus_or_disk_is_waited_for():
    machine = Machine(find_card("H200"), factors(read_measured()), "fp8", "bf16", "cudnn")
    blocks = [1_000_000_000] * 55
    two = Arrangement(frozenset(), 2)
    pinned, mapped = (streamed_seconds(machine, 0.1, blocks, two, each) for each in (True, False))
    assert 1.0 <= pinned <= 1.02
    assert mapped == pytest.approx(55e9 / 3e9, rel=0.02)


def test_more_work_takes_longer():
    machine = Machine(find_card("RTX 3060"), factors(read_measured()), "bf16", "bf16", "flash")
    weights = transformer_bytes(FLUX_DEV, "nf4")

    def seconds(job: Job, rank: int = 0) -> float:
        return step_seconds(machine, FLUX_DEV, job, weights, rank, modulation_resident=False)

    base = seconds(Job())
    assert seconds(Job(width=1280)) > base
    assert 1.8 * base < seconds(Job(batch=2)) < 2 * base  # decoding is done once
    assert base < seconds(Job(), rank=16) < seconds(Job(), rank=64)
    assert prepass_seconds(machine, FLUX_DEV, weights) < 0.3


def test_math_attention_is_not_predicted():
    machine = Machine(find_card("RTX 3060"), factors(read_measured()), "fp32", "fp32", "math")
    with pytest.raises(InvalidOptionError):
        attention_seconds(machine, 1e12)


# calibration ----------------------------------------------------------------------------------------------------------


def roofline_table():
    spec = importlib.util.spec_from_file_location("roofline_table", BENCHMARKS / "roofline_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def a_record(card: str = "NVIDIA H200") -> dict:
    """NF4 half as fast to decode as before."""
    labels = {"system": "gossamer", "compiled": False, "adapters": "none"}
    modulation = modulated_bytes("nf4") / (0.716 * 4.8e12) * 1028
    rows = [
        {**labels, "storage": "nf4", "compute": "fp8", "step_ms": 93.0 - modulation, "prepass_ms": 0.0},
        {**labels, "storage": "nf4", "compute": "bf16", "error": "out of memory"},
        {**labels, "system": "diffusers", "storage": "bf16", "compute": "bf16", "step_ms": 172.0},
    ]
    return {"machine": {"name": card}, "rows": rows}


def test_calibration_takes_our_rows_and_nothing_else(tmp_path):
    record, target = tmp_path / "flux_step-nvidia-h200-2027-01-01.json", tmp_path / "measured.json"
    record.write_text(json.dumps(a_record()))
    target.write_text(MEASURED.read_text())
    roofline_table().calibrate(record, target)
    after = read_measured(target)
    assert after["steps_ms"]["nf4/fp8/none"] == pytest.approx(93.0, rel=1e-3)
    assert {name: value for name, value in after["steps_ms"].items() if name != "nf4/fp8/none"} == {
        name: value for name, value in MEASURED_STEPS.items() if name != "nf4/fp8/none"
    }
    assert record.name in after["source"]
    assert factors(after).decode["nf4"] < 0.8 * factors(read_measured()).decode["nf4"]
    assert predicted_ms("Q4_K/fp8/none", factors(after)) == pytest.approx(predicted_ms("Q4_K/fp8/none"))


def test_calibration_of_another_card_is_refused(tmp_path):
    record, target = tmp_path / "record.json", tmp_path / "measured.json"
    record.write_text(json.dumps(a_record("NVIDIA L40S")))
    target.write_text(MEASURED.read_text())
    with pytest.raises(InvalidOptionError, match="L40S"):
        roofline_table().calibrate(record, target)
    assert target.read_text() == MEASURED.read_text()


def test_tables_go_where_a_file_has_room_and_nowhere_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "a\n<!-- efficiency: begin -->\nold\n<!-- efficiency: end -->\n<!-- x: begin -->\ny\n<!-- x: end -->\n"
    )
    roofline_table().write(page)
    text = page.read_text()
    assert "old" not in text
    assert "| fp8 products | 0.706 |" in text
    assert text.endswith("<!-- x: begin -->\ny\n<!-- x: end -->\n")
