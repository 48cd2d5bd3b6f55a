"""Where each part of a pipeline is loaded to: only what a placement keeps on the device goes there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from gossamer.memory.placement import Placement, spread
from gossamer.models.fill import OnHost
from gossamer.models.flux_spec import MODULATION, FluxSpec

HOST = torch.device("cpu")


@dataclass(frozen=True)
class Landing:
    """The device of a part, and its linears whose weights stay in host memory all the same."""

    device: torch.device
    on_host: OnHost = field(default_factory=OnHost)


def landing(part: str, device: torch.device, placement: Placement | None, spec: FluxSpec) -> Landing:
    """Of a part by its diffusers name. Without a placement everything is on the device; what takes turns waits on the
    host."""
    if placement is None or part == "vae":
        return Landing(device)
    if placement.text != "resident":
        return Landing(HOST, OnHost(("*",), mapped=not placement.pinned))
    if part != "transformer":
        return Landing(device)
    return Landing(device, OnHost(tuple(_leaving(placement, spec)), mapped=not placement.pinned))


def _leaving(placement: Placement, spec: FluxSpec) -> Iterator[str]:
    """Patterns of the transformer's linears that a placement streams."""
    if placement.modulation == "prepass":
        yield MODULATION
    count = spec.num_layers + spec.num_single_layers
    for index in sorted(set(range(count)) - spread(count, placement.resident_blocks)):
        single = index - spec.num_layers
        yield f"transformer_blocks.{index}.*" if single < 0 else f"single_transformer_blocks.{single}.*"
