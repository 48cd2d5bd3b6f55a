import json
import math
from pathlib import Path

import pytest

from gossamer.memory.fidelity import LEVELS, PSNR, combined, fidelity, least, show

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "embedded_model-nvidia-h200-2026-11-20.json"


def test_the_table_is_that_of_the_record():
    rows = json.loads(RECORD.read_text())["rows"]
    measured = {row["storage"]: row["likeness"]["psnr_mean"] for row in rows}
    assert set(PSNR) == set(measured)
    for storage, value in measured.items():
        assert PSNR[storage] == (math.inf if value is None else pytest.approx(value, abs=0.05)), storage


def test_levels_are_in_order():
    floors = [least(level) for level in LEVELS]
    assert floors == sorted(floors, reverse=True)
    assert least("Q4_K") == least("q4_k") == 27.3


def test_several_parts_are_as_good_as_the_worst():
    assert combined("bf16", "Q8_0", "nf4") == 25.9
    assert combined("bf16", "IQ4_NL") is None
    assert fidelity("fp16") == math.inf
    assert show(None) == "not measured"
