"""Builds a model from a stream of its weights, one tensor at a time: nothing is in memory twice.

    module on the meta device + stream of (name, tensor or Packed) -> the same module with values on a device

A linear whose name fits a pattern of `storage` becomes a QuantLinear. Its weight stays as the stream brings it where
that is wished ("stored"), or where it already has the wished format; else it is decoded and packed anew. Everything
else becomes a plain tensor of the type `dtype`. Every tensor of the stream is used, and every one of the model found.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

import torch
from torch import nn

from gossamer.checkpoints.mapped_file import own_copy, trim_heap
from gossamer.checkpoints.rows import join_rows
from gossamer.errors import FileDamagedError, GossamerError, InvalidOptionError
from gossamer.formats import Packed, find_format, find_packing_format, pack, plain, unpack
from gossamer.formats.checks import require_packable
from gossamer.formats.rows import row_split
from gossamer.layers import QuantLinear, StoredWeight
from gossamer.models.swap import QuantizeReport, weight_bytes

STORED = "stored"
VALUES_AT_A_TIME = 1 << 17  # 0.5 MB in float32; more is 7 % faster, and leaves holes of tens of MB on the heap
ROWS_TOGETHER = 64  # as many values as a block of nf4 has: a whole number of blocks, whatever the width

Stream = Iterable[tuple[str, Packed | torch.Tensor]]


@dataclass(frozen=True)
class OnHost:
    """Linears, by pattern, whose weights stay in host memory whatever the device is; `mapped` are those that keep the
    stream's bytes there as views of their file."""

    patterns: tuple[str, ...] = ()
    mapped: bool = False

    def __contains__(self, layer: str) -> bool:
        return any(fnmatchcase(layer, pattern) for pattern in self.patterns)


@dataclass(frozen=True)
class Target:
    """Where values go: storage format or "stored" by pattern of a linear's name, type of all other tensors, device."""

    storage: Mapping[str, str]
    dtype: torch.dtype
    device: torch.device
    on_host: OnHost = OnHost()

    def place(self, layer: str) -> torch.device:
        """The device of a linear's weight."""
        return torch.device("cpu") if layer in self.on_host else self.device

    def wish(self, layer: str) -> str | None:
        """The storage wished for a linear; None where it stays a plain one."""
        return next((wish for pattern, wish in self.storage.items() if fnmatchcase(layer, pattern)), None)


def fill(module: nn.Module, stream: Stream, target: Target, where: str) -> QuantizeReport:
    """Give a module on the meta device its values; `where` is the place of the stream's weights, for messages."""
    for name in target.storage.values():
        if name != STORED:
            find_format(name)
    filling = _Filling(module, target, where)
    for name, value in stream:
        filling.put(name, value)
    filling.finish()
    module.eval().requires_grad_(False)
    return QuantizeReport(filling.packed, filling.kept, filling.bytes_before, weight_bytes(module))


class _Filling:
    """A module on its way from the meta device."""

    def __init__(self, module: nn.Module, target: Target, where: str) -> None:
        self.packed: dict[str, str] = {}
        self.kept: dict[str, str] = {}
        self._module, self._target, self._where = module, target, where
        parameters = dict(module.named_parameters(remove_duplicate=False))
        self._shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self._same = _aliases(parameters)
        self._linears = {name for name, child in module.named_modules() if isinstance(child, nn.Linear)}
        self._left = set(parameters)
        self._counters = [name for name, _ in module.named_buffers()]
        #: bytes with every weight in `dtype`
        self.bytes_before = (
            sum(prod(self._shapes[group[0]]) for group in set(self._same.values())) * target.dtype.itemsize
        )

    def put(self, name: str, value: Packed | torch.Tensor) -> None:
        if name not in self._shapes:
            raise self._damaged(f"unexpected keys: {name}")
        shape = tuple(value.shape)
        if shape != self._shapes[name]:
            raise self._damaged(f"mismatched keys: {name} is {shape}, {self._shapes[name]} was expected")
        if name not in self._left:
            return self._require_same(name, value)
        layer, _, leaf = name.rpartition(".")
        wish = self._target.wish(layer) if layer in self._linears and leaf == "weight" else None
        if wish is None:
            self._set_plain(name, value)
        else:
            self._set_weight(layer, value, wish)
        self._left.difference_update(self._same[name])
        return None

    def finish(self) -> None:
        if self._left:
            named = ", ".join(sorted(self._left)[:5]) + (", ..." if len(self._left) > 5 else "")
            raise self._damaged(f"missing keys: {named} ({len(self._left)} in all)")
        _fill_counters(self._module, self._counters, self._target.device)

    def _set_plain(self, name: str, value: Packed | torch.Tensor) -> None:
        tensor = unpack(value, self._target.dtype) if isinstance(value, Packed) else value
        if not tensor.is_floating_point():
            raise self._damaged(f"{tensor.dtype} for {name}; numbers with a fraction were expected")
        if tensor.device == self._target.device and tensor.dtype == self._target.dtype:
            tensor = own_copy(tensor)
        parameter = nn.Parameter(tensor.to(self._target.device, self._target.dtype), requires_grad=False)
        for same in self._same[name]:
            parent, _, child = same.rpartition(".")
            setattr(self._module.get_submodule(parent), child, parameter)

    def _set_weight(self, layer: str, value: Packed | torch.Tensor, wish: str) -> None:
        packed, reason = self._stored(layer, value, wish)
        if reason is None:
            self.packed[layer] = packed.format
        else:
            self.kept[layer] = reason
        parent, _, child = layer.rpartition(".")
        old = self._module.get_submodule(layer)
        bias = old.bias if isinstance(old.bias, nn.Parameter) else None
        new = QuantLinear(StoredWeight(packed), bias, self._target.dtype)
        setattr(self._module.get_submodule(parent), child, new)

    def _stored(self, layer: str, value: Packed | torch.Tensor, wish: str) -> tuple[Packed, str | None]:
        """The weight as it stays in memory, and why it is not in the wished format."""
        own = value if isinstance(value, Packed) else self._held(layer, value)
        if wish == STORED or find_format(wish).name == own.format:
            return self._kept(layer, own), None
        multiple, width = find_packing_format(wish).width_multiple, own.shape[1]
        if width % multiple:
            return self._kept(layer, own), f"{width} input features are not a multiple of {multiple}, as {wish} needs"
        with _named(layer):
            packed = _repack(own, find_format(wish).name)
        moved = _moved(packed, self._target.place(layer))
        del packed
        trim_heap()
        return moved, None

    def _kept(self, layer: str, own: Packed) -> Packed:
        """The stored bytes on the device; plain values have to be finite, as those that are packed."""
        is_view = self._target.on_host.mapped and layer in self._target.on_host
        kept = own if is_view else _moved(own, self._target.place(layer))
        values = kept.tensors.get("values")
        # finding the extremes runs at 20 GB/s on one core, looking at each value at 0.5; NaN goes through it
        if values is not None and not values.is_meta and not all(map(torch.isfinite, values.aminmax())):
            with _named(layer):
                require_packable(values, "it is")
        return kept

    def _held(self, layer: str, value: torch.Tensor) -> Packed:
        if value.dtype not in plain.DTYPES.values():
            raise InvalidOptionError(
                f"The weight of {layer!r} in {self._where} is stored as {value.dtype}.",
                f"Plain weights may be {', '.join(plain.DTYPES)}.",
                "Use a version of the model in one of these types.",
            )
        return plain.hold(value)

    def _require_same(self, name: str, value: Packed | torch.Tensor) -> None:
        """A file may hold a tied weight under both of its names, if it is the same."""
        given = unpack(value, self._target.dtype) if isinstance(value, Packed) else value
        here = self._module.get_parameter(name)
        if not torch.equal(here, given.to(here.device, here.dtype)):
            others = [other for other in self._same[name] if other != name]
            raise self._damaged(f"two kinds of one weight: {name} differs from {', '.join(others) or 'itself'}")

    def _damaged(self, why: str) -> FileDamagedError:
        return FileDamagedError(
            f"The weights in {self._where} do not fit the model that they were to fill.",
            f"They have {why}.",
            "Download the model again, or choose the files of a FLUX.1 model.",
        )


def _aliases(parameters: Mapping[str, nn.Parameter]) -> dict[str, tuple[str, ...]]:
    """Every name that a parameter goes by, by each of them: tied weights are one parameter."""
    groups: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(id(parameter), []).append(name)
    return {name: tuple(names) for names in groups.values() for name in names}


@contextmanager
def _named(layer: str) -> Iterator[None]:
    """Errors about a weight say whose it is."""
    try:
        yield
    except GossamerError as error:
        raise type(error)(f"Layer {layer!r}: {error.what}", error.why, error.next_step) from error


def _repack(own: Packed, wish: str) -> Packed:
    """A weight in another format, some rows at a time, because packing takes several times the memory of its values.

    Rows are packed on their own in every format but the doubly quantised ones, whose scales share a mean.
    """
    rows, width = own.shape
    step = max(ROWS_TOGETHER, VALUES_AT_A_TIME // width // ROWS_TOGETHER * ROWS_TOGETHER)
    if wish.endswith("-dq") or rows <= step:
        return _packed(own, wish)
    starts = range(0, rows, step)
    return join_rows([_packed(row_split(own, start, min(start + step, rows)), wish) for start in starts])


def _packed(own: Packed, wish: str) -> Packed:
    values = own.tensors.get("values")
    return pack(unpack(own, torch.float32) if values is None else values, wish)


def _moved(packed: Packed, device: torch.device) -> Packed:
    """The same bytes on a device, in memory of their own."""
    if device.type == "cpu" and all(tensor.device.type == "cpu" for tensor in packed.tensors.values()):
        tensors = {role: own_copy(tensor) for role, tensor in packed.tensors.items()}
        return Packed(packed.format, tensors, packed.shape)
    return packed.to(device)


def _fill_counters(module: nn.Module, names: Iterable[str], device: torch.device) -> None:
    """Buffers that no file holds, because they only count: CLIP's positions 0, 1, 2, ..."""
    for name in names:
        parent, _, child = name.rpartition(".")
        if child != "position_ids":
            raise ValueError(f"nothing fills the buffer {name!r}")
        shape = module.get_buffer(name).shape
        counted = torch.arange(shape[-1], device=device).expand(shape)
        module.get_submodule(parent).register_buffer(child, counted, persistent=False)
