"""One part of a pipeline with stations for its blocks: which linears they have, and how blocks ask for them.

The transformer's blocks ask through the seam of its forward. Layers of a text encoder and the modulation linears, whose
callers are not ours or know nothing of memory, ask through the hooks that torch gives every module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from gossamer.errors import InvalidOptionError
from gossamer.layers import LinearGroup, QuantLinear, StoredWeight
from gossamer.memory.offload_carousel import Arrangement, Carousel
from gossamer.memory.offload_copier import Copier
from gossamer.memory.offload_feed import Feed
from gossamer.memory.offload_home import OpenFile
from gossamer.memory.offload_recording import Recording
from gossamer.memory.offload_schedule import Schedule
from gossamer.memory.offload_station import Station
from gossamer.models.flux.blocks import DoubleBlock, SingleBlock
from gossamer.models.flux.modulation import AdaLN
from gossamer.models.flux.seam import BlockWeights
from gossamer.models.flux.transformer import FluxTransformer


@dataclass(frozen=True, eq=False)
class Transport:
    """What all parts on a device share: who copies, from homes of which kind."""

    device: torch.device
    copier: Copier
    feed: Feed
    pinned: bool
    files: tuple[OpenFile, ...]


class Part:
    """Stations by the index of their blocks, and their carousel. Making one moves nothing; `go_home` does."""

    def __init__(self, stations: Mapping[int, Station], transport: Transport) -> None:
        self._stations = dict(stations)
        self._transport = transport
        self._carousel: Carousel | None = None

    @property
    def host_bytes_to_take(self) -> int:
        """Host memory that `go_home` takes and keeps."""
        return sum(self._to_take(station) for station in self._stations.values())

    @property
    def largest_bytes(self) -> int:
        """Of the largest station: while its bytes move they are there twice."""
        return max((station.nbytes for station in self._stations.values()), default=0)

    @property
    def host_bytes(self) -> int:
        """Of all weights, wherever they are at home on the host."""
        return sum(station.nbytes for station in self._stations.values())

    @property
    def device_bytes(self) -> int:
        """Device memory of the weights as they are arranged now."""
        return 0 if self._carousel is None else self._carousel.device_bytes

    @property
    def streamed_bytes(self) -> int:
        """What a pass through all blocks copies, of those that do not stay."""
        return 0 if self._carousel is None else self._carousel.streamed_bytes

    def go_home(self) -> None:
        """Put all bytes where copies start from."""
        for station in self._stations.values():
            station.go_home(self._transport.pinned, self._transport.files)

    def arrange(self, arrangement: Arrangement, schedule: Schedule) -> None:
        """Which stations stay on the device, how many others it has room for, and which are expected next."""
        self.close()
        transport = self._transport
        self._carousel = Carousel(self._stations, arrangement, schedule, transport.copier, transport.feed)

    def obstacle(self) -> str | None:
        """Why a recorded step cannot be repeated with its copies, or None."""
        return self._arranged().obstacle()

    def recording(self) -> Recording:
        """Of one step, and its copies."""
        return Recording(self._arranged())

    def arrive(self, index: int) -> None:
        """Have a block's weights on the device."""
        self._arranged().arrive(index)

    def depart(self, index: int) -> None:
        """All uses of the block were queued."""
        self._arranged().depart(index)

    def close(self) -> None:
        """Give the device memory back; the next block takes it again."""
        if self._carousel is not None:
            self._carousel.close()

    def settle(self) -> None:
        """Bring all weights to the device for good."""
        self.close()
        self._carousel = None
        for station in self._stations.values():
            station.settle()

    def withdraw(self) -> None:
        """Leave all weights on the host, where they are at home, as plain ones."""
        self.close()
        self._carousel = None
        for station in self._stations.values():
            station.withdraw()

    def _to_take(self, station: Station) -> int:
        return station.host_bytes_to_take(self._transport.pinned, self._transport.files)

    def _arranged(self) -> Carousel:
        if self._carousel is None:
            raise RuntimeError("a part has to be arranged before its blocks run")
        return self._carousel


# which linears --------------------------------------------------------------------------------------------------------


def block_stations(model: FluxTransformer, device: torch.device, indices: Iterable[int]) -> dict[int, Station]:
    """Stations of these blocks, double ones first, without the modulation."""
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    modulation = {layer.stored for layer in modulation_linears(model)}
    shared = _shared(blocks) | modulation
    chosen = {index: blocks[index] for index in indices}
    return _stations(chosen, device, shared)


def modulation_linears(model: FluxTransformer) -> list[QuantLinear]:
    """The modulation of all blocks in the order in which a forward reads it."""
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    linears: list[nn.Module] = []
    for block in blocks:  # the text's comes second in the block, and is read first
        linears += reversed([part.linear for part in block.modules() if isinstance(part, AdaLN)])
    return [linear for linear in linears if isinstance(linear, QuantLinear)]


def module_stations(layers: Sequence[nn.Module], device: torch.device) -> dict[int, Station]:
    """One station for each of these modules."""
    return _stations(dict(enumerate(layers)), device, _shared(layers))


def layer_list(module: nn.Module) -> nn.ModuleList:
    """The layers of a text encoder: of its lists of modules the one that holds the most packed bytes."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    largest = max(lists, key=_packed_bytes, default=None)
    if largest is None or not _packed_bytes(largest):
        raise InvalidOptionError(
            f"The layers of a {type(module).__name__} cannot be streamed.",
            "It has no list of layers with packed linears in it.",
            "Swap its linears first with gossamer.quantize, or keep it on the GPU.",
        )
    return largest


def _packed_bytes(part: nn.Module) -> int:
    return sum(stored.kept.nbytes for stored in part.modules() if isinstance(stored, StoredWeight))


def _shared(blocks: Sequence[nn.Module]) -> set[StoredWeight]:
    """Weights that several blocks have in common; they stay on the device."""
    seen: set[StoredWeight] = set()
    shared: set[StoredWeight] = set()
    for block in blocks:
        own = {part for part in block.modules() if isinstance(part, StoredWeight)}
        shared |= seen & own
        seen |= own
    return shared


def _stations(blocks: Mapping[int, nn.Module], device: torch.device, without: set[StoredWeight]) -> dict[int, Station]:
    stations = {}
    for index, block in blocks.items():
        layers = [part for part in block.modules() if isinstance(part, QuantLinear) and part.stored not in without]
        if layers:
            stations[index] = Station(layers, _groups(block), device)
    return stations


def _groups(block: nn.Module) -> Sequence[LinearGroup]:
    owners = [part for part in block.modules() if isinstance(part, (DoubleBlock, SingleBlock))]
    return [group for owner in owners for group in owner.groups]


# how they are asked for -----------------------------------------------------------------------------------------------


def watch(modules: Sequence[nn.Module], weights: BlockWeights) -> list[RemovableHandle]:
    """Have each module ask for its weights before it runs, by its place in the list, and say when it has run."""

    def asking(index: int) -> list[RemovableHandle]:
        def before(*_: Any) -> None:
            weights.arrive(index)

        def after(*_: Any) -> None:
            weights.depart(index)

        module = modules[index]
        return [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]

    return [handle for index in range(len(modules)) for handle in asking(index)]
