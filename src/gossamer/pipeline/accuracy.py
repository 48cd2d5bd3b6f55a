"""How right a plan was: what it predicted beside what a painting took."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gossamer.memory.byte_sizes import show_bytes
from gossamer.memory.request import Plan
from gossamer.pipeline.painter import Painting, Pipeline


@dataclass(frozen=True)
class Accuracy:
    """Bytes at the most, loading included, and seconds of a step after the first; None was not measured."""

    predicted_peak_bytes: int
    peak_bytes: int | None
    predicted_step_seconds: float
    step_seconds: float | None
    picture_seconds: float
    resident_blocks: int

    def as_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def said(self) -> tuple[str, ...]:
        """A line for people."""
        parts = []
        if self.peak_bytes is not None:
            parts.append(
                f"{show_bytes(self.peak_bytes)} of the GPU ({_off(self.peak_bytes, self.predicted_peak_bytes)})"
            )
        if self.step_seconds is not None:
            parts.append(f"{self.step_seconds:.3g} s a step ({_off(self.step_seconds, self.predicted_step_seconds)})")
        return (f"It took {', '.join(parts)}; {self.picture_seconds:.3g} s the picture.",) if parts else ()


def accuracy(pipeline: Pipeline, painting: Painting) -> Accuracy | None:
    """Of the plan that a pipeline painted by; None where there was none."""
    plan: Plan | None = pipeline.plan
    if plan is None:
        return None
    return Accuracy(
        predicted_peak_bytes=plan.peak_gpu_bytes,
        peak_bytes=pipeline.peak_gpu_bytes,
        predicted_step_seconds=plan.step_seconds,
        step_seconds=painting.seconds_per_step,
        picture_seconds=painting.seconds,
        resident_blocks=plan.placement.resident_blocks,
    )


def _off(actual: float, predicted: float) -> str:
    """How far the actual value is from the predicted one."""
    return f"{actual / predicted - 1:+.0%} against the prediction" if predicted else "not predicted"
