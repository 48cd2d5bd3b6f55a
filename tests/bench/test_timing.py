from __future__ import annotations

import time

import torch

from gossamer.bench.timing import Repeats, allocated_bytes, measure, release_memory

CPU = torch.device("cpu")


def test_every_call_is_counted_once_and_the_first_result_is_kept():
    results = []

    def step() -> torch.Tensor:
        results.append(torch.tensor(len(results)))
        return results[-1]

    timing = measure(step, CPU, Repeats(warmup=2, timed=5), weights_end=0)
    assert len(results) == 1 + 2 + 5
    assert timing.result is results[0]
    assert 0 <= timing.min_ms <= timing.median_ms <= timing.max_ms
    assert timing.first_call_seconds >= 0


def test_warming_up_takes_its_seconds_and_at_least_its_steps():
    calls = []

    def step() -> torch.Tensor:
        calls.append(time.perf_counter())
        time.sleep(0.01)
        return torch.zeros(1)

    started = time.perf_counter()
    measure(step, CPU, Repeats(warmup=2, timed=3, seconds=0.2), weights_end=0)
    assert calls[-3] - started >= 0.2
    assert 6 < len(calls) <= 24
    calls.clear()
    measure(step, CPU, Repeats(warmup=4, timed=3, seconds=0.005), weights_end=0)
    assert len(calls) == 1 + 4 + 3


def test_nothing_is_said_about_memory_that_nobody_counts():
    assert measure(lambda: torch.zeros(1), CPU, Repeats(0, 1), 0).peak_bytes is None
    assert allocated_bytes(CPU) == 0
    release_memory(CPU)
