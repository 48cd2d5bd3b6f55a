"""What there is to say about an adapter: what of the model it changes, at which strength, and in which steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gossamer.adapters.adapter import TRANSFORMER
from gossamer.adapters.terms import rank_of
from gossamer.pipeline.prepare import NamedAdapter
from gossamer.pipeline.schedule import Schedule


@dataclass(frozen=True)
class AdapterReport:
    """One adapter: linears that it changes by component, its ranks, the keys of its file that have no effect by reason,
    and the part of a run in which it acts.
    """

    name: str
    source: str
    scale: float
    start: float
    end: float
    fused: bool
    spelling: str
    modules: Mapping[str, int]
    ranks: tuple[int, ...]
    unused: Mapping[str, tuple[str, ...]]

    def as_json(self) -> dict[str, Any]:
        """Its fields as plain JSON values."""
        return asdict(self)

    def line(self, steps: int) -> str:
        """All but what is unused in one line; `steps` are those of the run."""
        modules = ", ".join(f"{count} linears of the {component}" for component, count in self.modules.items())
        parts = [modules or "norms only", _ranks(self.ranks), f"spelling {self.spelling}", f"scale {self.scale:g}"]
        if self.fused:
            parts.append("fused")
        if (self.start, self.end) != (0, 1):
            parts.append(_window(Schedule(self.start, self.end), steps))
        return f"{self.name}: {', '.join(part for part in parts if part)}"

    def unused_lines(self) -> list[str]:
        """One line a reason."""
        return [
            f"{self.source}: {len(keys)} tensors have no effect, such as {keys[0]!r}: {reason}."
            for reason, keys in self.unused.items()
        ]


def report_adapter(named: NamedAdapter) -> AdapterReport:
    """What is known of an adapter once its file was read."""
    adapter, window = named.adapter, named.choice.schedule
    by_component = {TRANSFORMER: adapter.terms, **adapter.text}
    ranks = {rank_of(term) for terms in by_component.values() for term in terms.values()}
    return AdapterReport(
        name=named.name,
        source=named.choice.source,
        scale=named.choice.scale,
        start=window.start,
        end=window.end,
        fused=named.fused,
        spelling=adapter.spelling,
        modules={component: len(terms) for component, terms in by_component.items() if terms},
        ranks=tuple(sorted(rank for rank in ranks if rank is not None)),
        unused={reason: tuple(keys) for reason, keys in adapter.unused_by_reason().items()},
    )


def _window(window: Schedule, steps: int) -> str:
    """Its steps as people count them, from 1."""
    inside = window.active_steps(steps)
    acting = f"step {inside[0] + 1}" if len(inside) == 1 else f"steps {inside[0] + 1} to {inside[-1] + 1}"
    return f"{acting} of {steps} ({window})"


def _ranks(ranks: tuple[int, ...]) -> str:
    if not ranks:
        return ""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
