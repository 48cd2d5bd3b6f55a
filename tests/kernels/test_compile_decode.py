"""Every decode kernel compiles to machine code for every chip, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gossamer.kernels.decode_support import READABLE

CHIPS = (75, 80, 86, 89, 90, 100, 120)
# most that a program may take: 64 KiB on Turing, 99 KiB on Ampere's and Blackwell's smaller chips
SHARED_BYTES = {75: 65536, 86: 101376, 89: 101376, 120: 101376}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """Facts about every compiled kernel, by chip."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # an empty cache: kernels that were compiled before would prove nothing
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, Path(__file__).parent / "compile_decode_cases.py"]
    pipes = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # two at once: the machines that test have two cores
    runs = [subprocess.Popen([*command, *map(str, CHIPS[half::2])], **pipes) for half in range(2)]
    facts = []
    for run in runs:
        printed, errors = run.communicate()
        assert run.returncode == 0, errors[-4000:]
        facts += [json.loads(line) for line in printed.splitlines()]
    return {chip: [kernel for kernel in facts if kernel["chip"] == chip] for chip in CHIPS}


@pytest.mark.parametrize("chip", CHIPS)
def test_every_format_compiles_for(kernels, chip):
    half, byte = ("bf16" if chip >= 80 else "fp16"), ("fp8" if chip >= 89 else "int8")
    made = {(kernel["storage"], kernel["output"]) for kernel in kernels[chip] if kernel["kernel"] == "decode"}
    assert {storage for storage, output in made if output == half} == set(READABLE)
    families = {READABLE[storage].family for storage, output in made if output == byte}
    assert families == {known.family for known in READABLE.values()}
    assert all(kernel["binary_bytes"] > 1000 for kernel in kernels[chip])


@pytest.mark.parametrize("chip", CHIPS)
def test_shared_memory_suffices_on(kernels, chip):
    assert max(kernel["shared_bytes"] for kernel in kernels[chip]) <= SHARED_BYTES.get(chip, 166912)


@pytest.mark.parametrize("chip", CHIPS)
def test_only_rows_of_up_change_threads_in_the_loop_of_the_gluon_kernel_on(kernels, chip):
    found = [kernel for kernel in kernels[chip] if kernel["gluon"]]
    assert len(found) >= (0 if chip < 80 else 8)
    # before and after the next rows are written, in one tile of eight; a warpgroup waits for its fence as well
    assert {kernel["barriers"] for kernel in found if kernel["terms"]} <= {2, 3}
    assert not [kernel for kernel in found if kernel["barriers"] and not kernel["terms"]]
    assert all(bool(kernel["products"]) == bool(kernel["terms"]) for kernel in found)
