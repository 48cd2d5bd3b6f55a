"""Attention in eight bits becomes the machine code that it is meant to, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("compile_attention_cases.py")
SOURCE = Path(__file__).parents[2] / "src"
CODES = {"codes": 12, "codes of a single block": 28, "codes of a double block": 28}  # loads of 16 bytes: see below
HOPPER_SHARED_BYTES = 227 * 1024


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What the script printed, by kernel; its cache is fresh, so that everything is compiled."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(SOURCE)}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-4000:]
    return {each["kernel"]: each for each in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def steps(facts) -> list[dict[str, int]]:
    """The loop over blocks of keys, once for each of three warpgroups; loops that write a result are larger ones."""
    found = [loop for loop in facts["attention"]["loops"] if "STG" not in loop]
    assert len(found) == 3
    return found


def test_the_kernels_fit_and_spill_nothing(facts):
    assert set(facts) == {*CODES, "attention"}
    for kernel in facts.values():
        assert kernel["shared_bytes"] <= HOPPER_SHARED_BYTES
        spilled = sum(kernel["code"].get(name, 0) for name in ("LDL", "STL"))
        assert spilled < 100  # between tiles, where 160 registers a thread do not hold everything; never in a loop


def test_scores_are_multiplied_in_int8_and_values_in_fp8(steps):
    """128 channels and 128 keys are 4 products each, of depth 32."""
    assert [(loop["IGMMA"], loop["QGMMA"]) for loop in steps] == [(4, 4)] * 3


def test_whole_numbers_are_not_converted(steps):
    for loop in steps:
        assert not {"I2F", "I2FP"} & set(loop)


def test_nothing_goes_through_shared_memory_between_the_products(steps):
    for loop in steps:
        assert not {"LDS", "STS", "LDSM", "STSM", "LDL", "STL"} & set(loop)


def test_products_are_waited_for_together(steps):
    """Where the compiler finds operands in flight across an edge, it waits after every product instead."""
    assert max(loop["WARPGROUP"] for loop in steps) < 8


def test_a_step_has_hardly_more_than_its_arithmetic(steps):
    """64 exponentials and maxima a thread, two logarithms' multiply-adds more, and conversions by pairs."""
    for loop in steps:
        assert loop["MUFU"] <= 68
        assert loop["F2FP"] == 32
        assert sum(loop.values()) < 550
        assert "PRMT" not in loop


def test_memory_is_loaded_by_the_copy_engine_and_in_whole_words(facts):
    assert facts["attention"]["code"]["UTMALDG"] >= 4


@pytest.mark.parametrize(("codes", "loads"), CODES.items())
def test_codes_are_made_of_whole_words(facts, codes, loads):
    """A thread has 32 values of q, k or v: 4 loads each. cos, sin and either norm weight take 4 each."""
    assert facts[codes]["vector_loads"] == facts[codes]["code"]["LDG"] == loads
    assert facts[codes]["half_vector_stores"] == 8  # of q and k
    assert facts[codes]["vector_stores"] == 2  # of v


@pytest.mark.parametrize("codes", CODES)
def test_two_programs_that_make_codes_fit_into_a_multiprocessor(facts, codes):
    """16 warps each, of 65536 registers."""
    assert facts[codes]["registers"] <= 64
