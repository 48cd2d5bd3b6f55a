"""In which steps of a run an adapter acts: one window, given as shares of the run.

    step i of n, counted from 0, is active where   start <= i / n < end

i / n is the share of the run that is done when step i begins. The window holds its start and not its end, so windows
that meet, such as 0-0.2 and 0.2-1, share no step and leave none out, for every n. (diffusers' control_guidance_end asks
for (i + 1) / n <= end: there a step that holds the meeting point belongs to neither.) A quotient and a decimal are
rounded to the same float where they are equal, so 3 of 10 steps are not less than 0.3.
"""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.errors import InvalidOptionError


@dataclass(frozen=True)
class Schedule:
    """The window from `start` to `end`, 0 <= start < end <= 1; inside an adapter has its scale, outside it has none."""

    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        numbers = all(isinstance(side, int | float) and not isinstance(side, bool) for side in (self.start, self.end))
        if not numbers or not 0 <= self.start < self.end <= 1:  # NaN too
            raise InvalidOptionError(
                f"{self.start!r} to {self.end!r} is no part of a run.",
                "A window is two shares of the run's steps: 0 is the beginning, 1 the end, and the start comes first.",
                "Give shares such as 0.2 and 0.9, for the steps from 20 % to 90 %.",
            )

    @property
    def whole(self) -> bool:
        """Whether every step of every run is inside."""
        return (self.start, self.end) == (0, 1)

    def active(self, step: int, steps: int) -> bool:
        """Whether step `step` of `steps`, counted from 0, is inside."""
        return self.start <= step / steps < self.end

    def factor(self, step: int, steps: int) -> float:
        """What an adapter's scale is multiplied with in a step."""
        return 1.0 if self.active(step, steps) else 0.0

    def active_steps(self, steps: int) -> range:
        """The active steps of a run, counted from 0."""
        inside = [step for step in range(steps) if self.active(step, steps)]
        return range(inside[0], inside[-1] + 1) if inside else range(0)

    def __str__(self) -> str:
        return f"{self.start:g}-{self.end:g}"
