"""In a rehearsal kernels are compiled and loaded side by side, and none of them runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from threading import Barrier

import pytest
import torch

from gossamer.kernels.pointwise.backends import TORCH
from gossamer.kernels.pointwise.launch import Launch, Plan
from gossamer.kernels.rehearsal import hashed_meanwhile, rehearse, under_way

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("rehearse_cases.py")
SOURCE = Path(__file__).parents[2] / "src"
CPU = torch.device("cpu")


class Code:
    """Stands for machine code on its way; loading it waits for all the others."""

    def __init__(self, barrier: Barrier, error: Exception | None = None) -> None:
        self.barrier, self.error, self.loads = barrier, error, 0

    def result(self) -> Code:
        self.barrier.wait(timeout=30)
        if self.error is not None:
            raise self.error
        return self

    def __getitem__(self, grid):
        self.loads += 1
        return lambda *arguments: None


class Kernel:
    """Stands for a kernel that has one code."""

    def __init__(self, code: Code) -> None:
        self.code, self.launches, self.asked = code, 0, []

    def warmup(self, *arguments, grid, **options):
        self.asked.append((grid, arguments, options))
        return self.code

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.launches += 1
            return self.code

        return launch


def launch_of(kernel: Kernel) -> Launch:
    return Launch(kernel, Plan((3, 1, 1), (8,), 4), -1)


def test_what_is_asked_for_is_loaded_side_by_side_once_and_does_not_run():
    barrier = Barrier(3)
    kernels = [Kernel(Code(barrier)) for _ in range(3)]
    launches = [launch_of(kernel) for kernel in kernels for _ in range(2)]
    x = torch.zeros(2)
    rehearse(lambda: [launch(x) for launch in launches], CPU)
    assert [kernel.asked for kernel in kernels] == [[((3, 1, 1), (x, 8), {"num_warps": 4})] * 2] * 3
    assert [kernel.code.loads for kernel in kernels] == [1, 1, 1]
    assert not any(kernel.launches for kernel in kernels)
    launches[0](x)
    assert kernels[0].launches == 1


def test_what_has_run_before_runs_in_a_rehearsal_too():
    kernel = Kernel(Code(Barrier(1)))
    launch = launch_of(kernel)
    launch(torch.zeros(2))
    rehearse(lambda: launch(torch.zeros(2)), CPU)
    assert not kernel.asked


@pytest.mark.parametrize("broken", ["code", "work"])
def test_errors_come_out_and_the_next_rehearsal_works(broken):
    kernel = Kernel(Code(Barrier(1), ValueError("no machine code")))

    def work() -> None:
        if broken == "work":
            raise ValueError("no work")
        launch_of(kernel)(torch.zeros(2))

    with pytest.raises(ValueError, match=f"no (machine )?{broken}"):
        rehearse(work, CPU)
    assert under_way() is None
    found = []
    rehearse(lambda: found.append(under_way()), CPU)
    assert found[0] is not None
    assert under_way() is None


def test_interpreted_kernels_write_nothing_in_a_rehearsal():
    from gossamer.kernels.pointwise.backends import triton_functions

    x, gate = torch.ones(1, 4, 48), torch.ones(1, 48)
    functions = triton_functions()
    with torch.no_grad():
        rehearse(lambda: functions.residual_gate_(x, gate, x), CPU)
        assert torch.equal(x, torch.ones(1, 4, 48))
        rehearse(lambda: TORCH.residual_gate_(x, gate, x), CPU)
    assert torch.equal(x, torch.full((1, 4, 48), 2.0))


def test_triton_compiles_equal_code_once_in_threads_and_nothing_again(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(SOURCE), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-4000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert len(facts["compiled"]) == len(facts["loaded"]) == 3
    assert all(name.startswith("gossamer-compile") for name in facts["compiled"] + facts["loaded"])
    assert facts["rehearsed"] == 0
    assert (facts["compilations"], facts["loads"], facts["launches"]) == (3, 3, 4)


def test_triton_hashes_itself_meanwhile(monkeypatch):
    from triton.runtime import cache

    hashed = []
    monkeypatch.setattr(cache, "triton_key", lambda: hashed.append(True))
    with pytest.raises(ValueError, match="inside"), hashed_meanwhile():
        raise ValueError("inside")
    assert hashed == [True]
