"""Carries a placement out: which weights stay on the device, which come to it, when, and from where.

    offloaded = offload(components, placement, device)     # once, after the linears were packed
    ...                                                     # paint with the components as ever
    offloaded.settle()                                      # all weights on the device for good
    offloaded.withdraw()                                    # or all of them on the host, for another placement
    offloaded = offloaded.rearranged(placement)             # or another one at once, where `can_become` says so

    text "resident"             every part has its memory at all times
    text "evicted", "streamed"  parts take turns: no two of text encoders, transformer and decoder's work are there
    modulation "prepass"        the linears of the modulation come one by one when it is computed, then go

Streamed weights are not merged with adapters, whatever the execution keeps otherwise: a merged copy that stays would be
the memory that streaming saves, and one made on the host would cross the bus twice at every change of a scale. Terms
are added while the stored bytes are decoded, which is as exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from gossamer.errors import InvalidOptionError
from gossamer.memory.gpu_memory import empty_cache
from gossamer.memory.offload_carousel import Arrangement
from gossamer.memory.offload_copier import copier_of
from gossamer.memory.offload_feed import feed_of
from gossamer.memory.offload_home import MappedFile, OpenFile
from gossamer.memory.offload_host import require_host_bytes
from gossamer.memory.offload_part import (
    Part,
    Transport,
    block_stations,
    layer_list,
    modulation_linears,
    module_stations,
    watch,
)
from gossamer.memory.offload_schedule import Cyclic, Once
from gossamer.memory.offload_strips import StripDecoder
from gossamer.memory.offload_turns import HOST, Guest, Turns
from gossamer.memory.placement import LAYER_SLOTS, Placement, spread
from gossamer.models.flux.graph import GraphedSteps
from gossamer.models.flux.prepare import forget_groups, join_groups
from gossamer.models.flux.seam import Resident
from gossamer.models.flux.transformer import FluxTransformer

TRANSFORMER, MODULATION, TEXT_ENCODERS = "transformer", "modulation", ("text_encoder", "text_encoder_2")

Models = Mapping[str, Any]  # the components that hold weights, by their diffusers names


@dataclass(frozen=True, eq=False)
class Offload:
    """A placement that was carried out. `parts` are what comes block by block: the transformer, its modulation, and
    text encoders."""

    models: Models
    parts: Mapping[str, Part]
    handles: list[RemovableHandle]
    transport: Transport
    placement: Placement
    turns: Turns

    def can_become(self, placement: Placement) -> bool:
        """Whether another placement needs no weight to move: where parts take turns, every block has a home anyway."""
        here = self.placement
        take_turns = here.text != "resident" and placement.text != "resident"
        return take_turns and (here.pinned, here.modulation) == (placement.pinned, placement.modulation)

    def rearranged(self, placement: Placement) -> Offload:
        """Carry out another placement, which this one `can_become`."""
        if not self.can_become(placement):
            raise ValueError(f"{self.placement} cannot become {placement} in place")
        self.turns.take(None)
        _arrange(self.models, placement, self.parts)
        if placement.vae != self.placement.vae and "vae" in self.models:
            _place_decoder(self.models["vae"], placement)
            self.handles.append(self.turns.on_call(self.models["vae"].decoder, None))
        return replace(self, placement=placement)

    @property
    def device_bytes(self) -> Mapping[str, int]:
        """Device memory of what comes block by block, while it is there."""
        return {name: part.device_bytes for name, part in self.parts.items()}

    def settle(self) -> None:
        """Undo all of it: every component is on the device for good, as if it had never been anywhere else."""
        _drop_graphs(self.models, self.transport.device)
        for part in self.parts.values():
            part.settle()
        self._end(self.transport.device)

    def withdraw(self) -> None:
        """Undo all of it with every component on the host, so that the device holds none of them.

        Weights that came block by block stay where their copies started from. What else was on the device needs host
        memory: too little of that is an error before anything moves.
        """
        staying = sum(map(_device_tensor_bytes, self.models.values()))
        require_host_bytes(staying, "the weights that leave the GPU")
        _drop_graphs(self.models, self.transport.device)
        for part in self.parts.values():
            part.withdraw()
        self._end(HOST)

    def _end(self, device: torch.device) -> None:
        """Nothing asks for weights any more; everything else goes to a device."""
        for handle in self.handles:
            handle.remove()
        if TRANSFORMER in self.models:
            transformer = self.models[TRANSFORMER]
            transformer.weights = Resident()
            forget_groups(transformer)
        if "vae" in self.models:
            _place_decoder(self.models["vae"], Placement(0))
        for model in self.models.values():
            model.to(device)
        self.transport.feed.close()
        for file in self.transport.files:
            file.close()


def offload(
    components: Mapping[str, Any],
    placement: Placement,
    device: torch.device,
    files: Iterable[MappedFile] = (),
) -> Offload:
    """Carry a placement out on a pipeline's components, by their diffusers names; any of them may be missing.

    The linears have to be packed, and to have their executions for `device`, before; the components may be on the host
    or on the device. `files` are what weights on the host are mapped from: without pinned memory they stay there, and
    are read from there. Too little host memory is an error before anything moves; after any other error all components
    are on the host.
    """
    device = _with_index(device)
    models: Models = {name: model for name, model in components.items() if isinstance(model, nn.Module)}
    opened = () if placement.pinned else tuple(OpenFile(file) for file in files)
    copier = copier_of(device)
    transport = Transport(device, copier, feed_of(copier, device, placement.pinned), placement.pinned, opened)
    parts = _parts(models, placement, transport)
    _require_host(parts.values())
    offloaded = Offload(models, parts, [], transport, placement, Turns())
    try:
        _carry_out(offloaded)
    except BaseException:
        offloaded.withdraw()
        raise
    return offloaded


def arrange_blocks(part: Part, placement: Placement, count: int) -> None:
    """Arrange a transformer's `count` blocks as a placement says; those without a station stay where they are."""
    part.arrange(Arrangement.of(placement, count), Cyclic(count))


# the steps ------------------------------------------------------------------------------------------------------------


def _carry_out(offloaded: Offload) -> None:
    models, parts, device = offloaded.models, offloaded.parts, offloaded.transport.device
    _drop_graphs(models, device)
    for part in parts.values():
        part.go_home()
    if "vae" in models:
        _place_decoder(models["vae"], offloaded.placement)
    _arrange(models, offloaded.placement, parts)
    offloaded.handles.extend(_ask(models, parts))
    if offloaded.placement.text != "resident":
        offloaded.handles.extend(_take_turns(offloaded))
        return
    for model in models.values():
        model.to(device)
    if TRANSFORMER in models:
        join_groups(models[TRANSFORMER])


def _parts(models: Models, placement: Placement, transport: Transport) -> dict[str, Part]:
    """What comes block by block. A transformer that takes turns leaves as a whole, so all of its blocks do."""
    stations: dict[str, Any] = {}
    turns, device = placement.text != "resident", transport.device
    if TRANSFORMER in models:
        transformer = models[TRANSFORMER]
        count = block_count(transformer)
        _require_sound(placement, count)
        staying = () if turns else spread(count, placement.resident_blocks)
        streamed = [index for index in range(count) if index not in staying]
        stations[TRANSFORMER] = block_stations(transformer, device, streamed)
        if turns or placement.modulation == "prepass":
            stations[MODULATION] = module_stations(modulation_linears(transformer), device)
    for name in TEXT_ENCODERS:
        if turns and name in models:
            stations[name] = module_stations(list(layer_list(models[name])), device)
    return {name: Part(own, transport) for name, own in stations.items() if own}


def block_count(model: FluxTransformer) -> int:
    """Blocks of both kinds."""
    return len(model.transformer_blocks) + len(model.single_transformer_blocks)


def _require_host(parts: Iterable[Part]) -> None:
    """One station's bytes are there twice while it moves."""
    parts = list(parts)
    taken = sum(part.host_bytes_to_take for part in parts)
    passing = max((part.largest_bytes for part in parts), default=0)
    require_host_bytes(taken + passing, "the weights that do not stay on the GPU")


def _arrange(models: Models, placement: Placement, parts: Mapping[str, Part]) -> None:
    """Say which stations stay while their part is there."""
    if TRANSFORMER in parts:
        arrange_blocks(parts[TRANSFORMER], placement, block_count(models[TRANSFORMER]))
    if MODULATION in parts:
        count = len(modulation_linears(models[TRANSFORMER]))
        _arrange_modules(parts[MODULATION], count, placement.modulation == "resident")
    for name in TEXT_ENCODERS:
        if name in parts:
            _arrange_modules(parts[name], len(layer_list(models[name])), placement.text == "evicted")


def _arrange_modules(part: Part, count: int, stay: bool) -> None:
    """Each module's weights come when it is called: to stay until the part leaves, or to go when it has run."""
    resident = frozenset(range(count)) if stay else frozenset[int]()
    part.arrange(Arrangement(resident, LAYER_SLOTS), Cyclic(count) if stay else Once(count))


def _ask(models: Models, parts: Mapping[str, Part]) -> list[RemovableHandle]:
    """Have blocks, modulation linears and layers ask for their weights."""
    handles = []
    if TRANSFORMER in parts:
        models[TRANSFORMER].weights = parts[TRANSFORMER]
    if MODULATION in parts:
        handles += watch(modulation_linears(models[TRANSFORMER]), parts[MODULATION])
    for name in TEXT_ENCODERS:
        if name in parts:
            handles += watch(list(layer_list(models[name])), parts[name])
    return handles


def _place_decoder(vae: Any, placement: Placement) -> None:
    """Decode in strips where the placement says so, else as a whole."""
    whole = vae.decoder.whole() if isinstance(vae.decoder, StripDecoder) else vae.decoder
    vae.decoder = StripDecoder.of(whole) if placement.vae == "tiled" else whole


def _take_turns(offloaded: Offload) -> list[RemovableHandle]:
    """The transformer and each text encoder come when they are called. The VAE stays; what is called in it makes the
    others leave."""
    models, parts, turns, device = offloaded.models, offloaded.parts, offloaded.turns, offloaded.transport.device
    handles = []
    for name in (TRANSFORMER, *TEXT_ENCODERS):
        if name in models:
            own = (name, MODULATION) if name == TRANSFORMER else (name,)
            before_leaving = partial(_drop_graphs, {name: models[name]}, device)
            guest = Guest(models[name], [parts[each] for each in own if each in parts], device, before_leaving)
            handles.append(turns.on_call(models[name], guest))
    if "vae" in models:
        models["vae"].to(device)
        handles += [turns.on_call(child, None) for child in models["vae"].children()]
    return handles


def _drop_graphs(models: Models, device: torch.device) -> None:
    """Have no step captured, because it reads from where weights are now, and give its memory to what comes next."""
    stepper = models[TRANSFORMER].stepper if TRANSFORMER in models else None
    if isinstance(stepper, GraphedSteps) and stepper.release():
        empty_cache(device)


# checks ---------------------------------------------------------------------------------------------------------------


def _device_tensor_bytes(model: nn.Module) -> int:
    """Of parameters and buffers that are not on the host."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values() if tensor.device.type != "cpu")


def _require_sound(placement: Placement, count: int) -> None:
    if not 0 <= placement.resident_blocks <= count or placement.slots < 1:
        raise InvalidOptionError(
            f"{placement.resident_blocks} resident blocks and {placement.slots} slots are no placement for this model.",
            f"It has {count} blocks, and what is streamed needs a slot to come to.",
            f"Choose 0 to {count} resident blocks, and 1 or more slots; 2 let copies run beside the computing.",
        )


def _with_index(device: torch.device) -> torch.device:
    """The device as tensors name it."""
    return torch.device(device.type, torch.cuda.current_device()) if device == torch.device("cuda") else device
