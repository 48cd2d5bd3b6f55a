"""The adapters of one pipeline by name: attached, fused, or exchanged all at once, always in step with the models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gossamer.adapters.attach import attach, detach, set_scale
from gossamer.adapters.cost import Cost
from gossamer.adapters.fuse import fuse, fused_adapters, unfuse
from gossamer.adapters.fuse_report import FuseReport
from gossamer.adapters.records import attached
from gossamer.adapters.schedule import AtStep, over_steps
from gossamer.errors import AdapterError, InvalidOptionError
from gossamer.models.flux_spec import FluxSpec
from gossamer.pipeline.loras import LoraChoice, choose_lora
from gossamer.pipeline.prepare import NamedAdapter, free_name, read_adapters
from gossamer.pipeline.schedule import Schedule


class AdapterSet:
    """What is attached to, and fused into, a transformer and its text encoders."""

    def __init__(self, parts: Mapping[str, Any], device: torch.device) -> None:
        self._transformer = parts["transformer"]
        self._encoders = {name: parts[name] for name in ("text_encoder", "text_encoder_2")}
        self._device = device  # of the pictures; weights may wait elsewhere
        # sizes before any Control LoRA widens the input
        self.spec = FluxSpec.from_config(self._transformer.config)
        self._attached: dict[str, NamedAdapter] = {}
        self._fused: dict[str, NamedAdapter] = {}

    @property
    def attached(self) -> dict[str, NamedAdapter]:
        """Those that can be scaled and detached, in order of attachment."""
        return dict(self._attached)

    @property
    def fused(self) -> dict[str, NamedAdapter]:
        """Those that are part of the weights."""
        return dict(self._fused)

    def all(self) -> list[NamedAdapter]:
        """All that act, in the order in which a recipe tells them."""
        return [*self._fused.values(), *self._attached.values()]

    def costs(self) -> dict[str, Cost]:
        """What each attached adapter takes of the device's memory."""
        return {name: record.cost for name, record in attached(self._transformer).items()}

    # one at a time ----------------------------------------------------------------------------------------------------

    def read(self, choice: LoraChoice) -> NamedAdapter:
        """An adapter from its file, under a name that is free."""
        (named,) = read_adapters([choice], self.spec, self._device)
        self._require_new(named, self.all())
        return replace(named, name=free_name(named.name, self._names()))

    def attach(self, named: NamedAdapter) -> None:
        """Attach an adapter that was read already."""
        attach(self._transformer, named.adapter, named.name, named.choice.scale, self._encoders)
        self._attached[named.name] = named

    def detach(self, name: str) -> None:
        """Take an adapter off."""
        self._require(name)
        detach(self._transformer, name, self._encoders)
        del self._attached[name]

    def change(self, name: str, scale: float, schedule: Schedule) -> None:
        """Give an attached adapter another scale and window."""
        named = self._require(name)
        changed = LoraChoice(named.choice.source, scale, schedule)
        set_scale(self._transformer, name, scale, self._encoders)
        self._attached[name] = replace(named, choice=changed)

    def choice(self, name: str) -> LoraChoice:
        """How an attached adapter acts."""
        return self._require(name).choice

    # all at once ------------------------------------------------------------------------------------------------------

    def swap(self, wanted: Iterable[LoraChoice]) -> None:
        """Attach exactly these; what stays is not read again and keeps its place, before what is new.

        A choice means an attached adapter if its source is that adapter's name, or its source. After an error the set
        is the one that it was.
        """
        stays, new = self._divide(wanted)
        before = dict(self._attached)
        try:
            for name in before.keys() - stays.keys():
                self.detach(name)
            for name, choice in stays.items():
                self.change(name, choice.scale, choice.schedule)
            for named in new:
                self.attach(replace(named, name=free_name(named.name, self._names())))
        except BaseException:
            self._put_back(before)
            raise

    def _divide(self, wanted: Iterable[LoraChoice]) -> tuple[dict[str, LoraChoice], list[NamedAdapter]]:
        """Which attached adapters stay, and how; and the others, read."""
        by_source = {named.choice.source: name for name, named in self._attached.items()}
        stays: dict[str, LoraChoice] = {}
        unknown: list[LoraChoice] = []
        for choice in wanted:
            name = choice.source if choice.source in self._attached else by_source.get(choice.source)
            if name is None:
                unknown.append(choice)
                continue
            if name in stays:
                raise _twice(name, name)
            stays[name] = replace(choice, source=self._attached[name].choice.source)
        new = list(read_adapters(unknown, self.spec, self._device))
        for place, named in enumerate(new):
            kept = [self._attached[name] for name in stays]
            self._require_new(named, [*self._fused.values(), *kept, *new[:place]])
        return stays, new

    def _put_back(self, before: Mapping[str, NamedAdapter]) -> None:
        """Exactly the adapters of before, in their order: what sums round to depends on it."""
        for name in attached(self._transformer):
            detach(self._transformer, name, self._encoders)
        self._attached = {}
        for named in before.values():
            self.attach(named)

    # fused ------------------------------------------------------------------------------------------------------------

    def fuse(self, names: Iterable[str] | None, keep_originals: bool) -> FuseReport:
        """Make attached adapters, all by default, part of the weights."""
        chosen = list(self._attached) if names is None else list(names)
        for name in chosen:
            schedule = self._require(name).choice.schedule
            if not schedule.whole:
                raise InvalidOptionError(
                    f"The adapter {name!r} cannot be fused: it acts in a part of a run, {schedule}.",
                    "What is part of the weights acts in every step.",
                    "Keep it attached, or let it act in the whole run with set_schedule first.",
                )
        report = fuse(self._transformer, chosen, self._encoders, keep_originals)
        self._fused = {name: replace(self._attached[name], fused=True) for name in report.adapters}
        self._attached = {name: named for name, named in self._attached.items() if name not in report.adapters}
        return report

    def unfuse(self) -> tuple[str, ...]:
        """Give the weights their original bytes and attach what was fused, after what is attached."""
        names = unfuse(self._transformer, self._encoders)
        self._attached |= {name: replace(self._fused[name], fused=False) for name in names}
        self._fused = {}
        return names

    # a run ------------------------------------------------------------------------------------------------------------

    def over_steps(self, steps: int) -> AbstractContextManager[AtStep]:
        """Gives adapters with a window their strength at each step of a run; see `adapters.schedule`."""
        windows = {name: named.choice.schedule for name, named in self._attached.items()}
        factors = {name: partial(window.factor, steps=steps) for name, window in windows.items() if not window.whole}
        return over_steps(self._transformer, factors, self._encoders)

    def require_in_step(self) -> None:
        """The transformer holds what this set says, and nothing else."""
        there = {name: attachment.scale for name, attachment in attached(self._transformer).items()}
        own = {name: named.choice.scale for name, named in self._attached.items()}
        parts = fused_adapters(self._transformer)
        if there != own or set(parts) != set(self._fused):
            raise AdapterError(
                "The transformer's adapters were changed behind the pipeline's back.",
                f"On the transformer: {there or 'none'}, fused: {', '.join(parts) or 'none'}; in the pipeline: "
                f"{own or 'none'}, fused: {', '.join(self._fused) or 'none'}. "
                "The picture would carry settings that are not its own.",
                "Use attach, detach, set_scale, fuse and unfuse of the pipeline.",
            )

    # names ------------------------------------------------------------------------------------------------------------

    def _names(self) -> dict[str, NamedAdapter]:
        return {**self._fused, **self._attached}

    def _require(self, name: str) -> NamedAdapter:
        if name in self._attached:
            return self._attached[name]
        if name in self._fused:
            raise AdapterError(
                f"The adapter {name!r} is fused.",
                "It is part of the weights, so it can be neither scaled nor detached.",
                "Call unfuse() first.",
            )
        raise AdapterError(
            f"No adapter called {name!r} is attached.",
            f"Attached: {', '.join(self._attached) or 'none'}.",
            "Use one of the attached names.",
        )

    def _require_new(self, named: NamedAdapter, others: Iterable[NamedAdapter]) -> None:
        for other in others:
            if other.adapter.sha256 == named.adapter.sha256:
                raise _twice(named.choice.source, other.name)


def wanted_choices(loras: Mapping[str, float] | Iterable[str | Path | LoraChoice]) -> list[LoraChoice]:
    """A set of adapters as `swap` is given it: scales by name or file, or the texts and choices that `attach` takes."""
    if isinstance(loras, Mapping):
        return [LoraChoice(source, scale) for source, scale in loras.items()]
    if isinstance(loras, str):
        raise InvalidOptionError(
            f"{loras!r} is one adapter, not a set of them.",
            "A set is a table of scales by name or file, or a list.",
            f"Write it like {{{loras!r}: 0.8}} or [{loras!r}].",
        )
    return [choose_lora(lora) for lora in loras]


def _twice(source: str, name: str) -> AdapterError:
    return AdapterError(
        f"The adapter {source!r} is attached already, as {name!r}.",
        "Attaching it twice would add up both scales unnoticed.",
        "Change its strength with set_scale, or detach it first.",
    )
