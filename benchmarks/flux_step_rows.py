"""One row of `flux_step`: a model built, adapted, timed and held to the float32 result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from flux_step_cases import OURS, Case, attach_all, detach_all, spelled
from gossamer.bench.metrics import relative_error
from gossamer.bench.random_flux import Workload, adapter_bytes, random_adapters, reference, step_inputs
from gossamer.bench.timing import Repeats, allocated_bytes, measure, release_memory
from gossamer.models.flux.modulation import Conditions, modulate
from gossamer.models.flux.prepass import Prepass

ERROR_LENGTH = 400
RUN_STEPS = 28  # of the run whose modulation is computed at once

Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What all rows share. `references` is a folder that keeps one float32 result for each kind of adapters."""

    work: Workload
    repeats: Repeats
    references: Path


def labels(case: Case, kind: str) -> Row:
    """The part of a row that says what was measured."""
    return {
        "system": case.system,
        "compiled": case.compiled,
        "storage": case.storage,
        "compute": case.compute,
        "adapters": kind,
        **({} if case.copies else {"copies": False}),
    }


def name_of(row: Row) -> str:
    """The name of a row of a record, as `Case.row_name` gives it."""
    system = spelled(row["system"], row["compiled"], row.get("copies", True))
    return f"{system}/{row['storage']}/{row['compute']}/{row['adapters']}"


def rows_of(case: Case, kinds: Sequence[str], bench: Bench) -> Iterator[Row]:
    """One row for each kind of adapters, on one model; after a failure the next kind begins with a new model."""
    subject: Subject | None = None
    for kind in kinds:
        try:
            repeats = bench.repeats
            if subject is not None:  # the chip is warm
                repeats = replace(repeats, seconds=repeats.seconds / 3)
            subject = subject or Subject(case, bench)
            measured = subject.measure(kind, repeats)
        except Exception as error:
            if case.system == OURS:
                raise
            subject = None
            measured = {"error": f"{type(error).__name__}: {error}"[:ERROR_LENGTH]}
        release_memory(bench.work.device)
        yield {**labels(case, kind), **measured}


@dataclass(frozen=True)
class Schedule:
    """A run's timesteps, the workload's own first, as the pre-pass reads a scheduler."""

    timesteps: torch.Tensor
    step_index: int | None = 0
    begin_index: int | None = 0


def prepass_of(model: Any, inputs: Mapping[str, torch.Tensor]) -> Prepass:
    """The pre-pass of a run of RUN_STEPS steps."""
    own = inputs["timestep"]
    return Prepass(model, Schedule(torch.linspace(float(own[0]) * 1000, 1000.0, RUN_STEPS, device=own.device)))


def run_modulation(model: Any, prepass: Prepass, inputs: Mapping[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Computes the modulation of a whole run; the last of its vectors."""
    pooled = inputs["pooled_projections"].to(model.dtype)
    given = Conditions(inputs["timestep"], inputs["guidance"], pooled, model.dtype)
    whole = prepass.conditions(given, range(RUN_STEPS))
    return lambda: modulate(model, whole).out.scale


class Subject:
    """A built model, and what was allocated with and without it.

    Ours computes its modulation once a run, in its first step. A step counts with its share of that, for a run of
    RUN_STEPS steps; the peers' modulation is in every step of theirs.
    """

    def __init__(self, case: Case, bench: Bench) -> None:
        self.case, self.bench, device = case, bench, bench.work.device
        self.inputs = step_inputs(bench.work)
        release_memory(device)
        self.before = allocated_bytes(device)
        self.model = case.build(bench.work)
        self.prepass = self._prepass() if case.system == OURS else None
        release_memory(device)
        self.weights = allocated_bytes(device) - self.before

    def _prepass(self) -> Prepass:
        made = self.model.modulator = prepass_of(self.model, self.inputs)
        return made

    def _prepass_ms(self) -> float:
        """Milliseconds of the modulation of a whole run."""
        if self.prepass is None:
            return 0.0
        modulation = run_modulation(self.model, self.prepass, self.inputs)
        return measure(modulation, self.bench.work.device, replace(self.bench.repeats, seconds=0.0), 0).median_ms

    @torch.no_grad()
    def measure(self, kind: str, repeats: Repeats) -> Row:
        """What a row says besides its labels."""
        work = self.bench.work
        detach_all(self.case, self.model)
        adapters = random_adapters(work, kind)
        # counted, not read off the allocator: buffers that an earlier row left behind belong to the peak
        weights = self.weights + adapter_bytes(adapters)
        attach_all(self.case, self.model, adapters)
        del adapters  # PEFT may hold copies, and a user would hold nothing else
        timing = measure(self._step, work.device, repeats, self.before + weights)
        prepass_ms = self._prepass_ms()
        share = prepass_ms / RUN_STEPS
        return {
            "step_ms": timing.median_ms + share,
            "step_ms_min": timing.min_ms + share,
            "step_ms_max": timing.max_ms + share,
            "prepass_ms": prepass_ms,
            "peak_bytes": timing.peak_bytes,
            "weight_bytes": weights if work.device.type == "cuda" else None,
            "first_call_seconds": timing.first_call_seconds,
            "relative_error": relative_error(timing.result.float(), kept_reference(self.bench, kind)),
        }

    def _step(self) -> torch.Tensor:
        result: torch.Tensor = self.model(**self.inputs, return_dict=False)[0]
        return result


def keep_reference(bench: Bench, kind: str) -> None:
    """Compute the float32 result unless the folder has it."""
    path = bench.references / f"{kind}.safetensors"
    if not path.exists():
        bench.references.mkdir(parents=True, exist_ok=True)
        save_file({"sample": reference(bench.work, kind)}, path)
        release_memory(bench.work.device)


def kept_reference(bench: Bench, kind: str) -> torch.Tensor:
    """The float32 result that rows with these adapters are held to."""
    return load_file(bench.references / f"{kind}.safetensors", device=str(bench.work.device))["sample"]
