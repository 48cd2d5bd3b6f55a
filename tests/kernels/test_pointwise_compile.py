"""Every pointwise kernel becomes machine code for every chip, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_pointwise_cases.py")
SOURCE = Path(__file__).parents[2] / "src"
CHIPS = (75, 80, 86, 89, 90, 100, 120)
EVERYWHERE = {"norm_modulate_kernel": 4, "head_tail_kernel": 6, "residual_gate_kernel": 1, "qk_norm_rope_kernel": 2}
EVERYWHERE |= {"rescale_product_kernel": 2}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    """What the script printed; its cache is fresh, so that everything is compiled."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(SOURCE)}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    command = [sys.executable, str(SCRIPT), *map(str, CHIPS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("chip", CHIPS)
def test_every_kernel_compiles_for_every_chip(compiled, chip):
    facts = [fact for fact in compiled if fact["chip"] == chip]
    fp8 = {"norm_modulate_kernel": 2, "head_tail_kernel": 3} if chip >= 89 else {}
    assert Counter(fact["kernel"] for fact in facts) == Counter(EVERYWHERE) + Counter(fp8)
    assert ("float8_e4m3fn" in {fact["output"] for fact in facts}) == (chip >= 89)
    assert all(fact["binary_bytes"] > 1000 for fact in facts)


def test_rows_are_read_sixteen_bytes_at_a_time(compiled):
    assert all(fact["vector_loads"] >= 2 for fact in compiled), [f for f in compiled if f["vector_loads"] < 2]
    # but the narrow part of a concatenation: its three pieces have four values for each thread of the wide part's
    halves = [fact for fact in compiled if fact["half_vector_loads"]]
    assert {fact["kernel"] for fact in halves} == {"head_tail_kernel"}
    assert all(fact["half_vector_loads"] == 3 and fact["vector_loads"] >= 6 for fact in halves)


def test_a_peak_keeps_nan(compiled):
    """The interpreter cannot show it: its maximum keeps NaN anyway. Chips before 80 do it without the instruction."""
    coded = [fact for fact in compiled if fact["output"] in ("int8", "float8_e4m3fn") and fact["chip"] >= 80]
    assert coded
    assert all(fact["nan_maxima"] > 0 for fact in coded)
