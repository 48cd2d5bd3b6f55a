"""Rehearse pointwise kernels with Triton's own compiler and a driver that is not there: `python rehearse_cases.py`.

A script, not a test, because Triton compiles only in a process that was not started with its interpreter switched on.
Prints one JSON line: where what was compiled and loaded, and what was launched during the rehearsal and after it.
"""

from __future__ import annotations

import json
from threading import current_thread
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from gossamer.kernels.pointwise import Modulation
from gossamer.kernels.pointwise.backends import triton_functions
from gossamer.kernels.rehearsal import rehearse

CPU = torch.device("cpu")


class Driver:
    """Of one Hopper GPU; it notes what reaches it."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.launched = 0
        self.utils = self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def load_binary(self, name: str, *_: Any) -> tuple[object, object, int, int, int]:
        self.loaded.append(current_thread().name)
        return object(), object(), 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return self._launch

    def _launch(self, *_: Any) -> None:
        self.launched += 1


def block() -> None:
    """Three kernels, one of them for two counts of tokens that need the same code."""
    functions = triton_functions()
    by = Modulation(torch.zeros(1, 64), torch.zeros(1, 64))
    for tokens in (16, 32):
        functions.norm_modulate(torch.zeros(1, tokens, 64), by, torch.int8)
    x = torch.zeros(1, 16, 64)
    functions.residual_gate_(x, by.scale, x)
    functions.quantize_rows(x, torch.int8)


def main() -> None:
    used, compiled = Driver(), []
    driver.set_active(used)
    knobs.compilation.listener = lambda **_: compiled.append(current_thread().name)
    with torch.no_grad():
        rehearse(block, CPU)
        facts: dict[str, Any] = {"compiled": list(compiled), "loaded": list(used.loaded), "rehearsed": used.launched}
        block()
    print(json.dumps({**facts, "compilations": len(compiled), "loads": len(used.loaded), "launches": used.launched}))


if __name__ == "__main__":
    main()
