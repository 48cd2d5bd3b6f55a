"""How a pointwise kernel is launched: a pure function of the layouts, the same on every chip and for every token count.

A program works on whole rows, so that a row is read once and stays in registers. Triton's tiles have power-of-two
sizes; a row of 3072 is taken as three pieces of 1024, without padding, rather than as a tile of 4096 a quarter empty.

A `Launcher` checks the tensors and looks the machine code up once for every layout, not at every call: a kernel takes
20 us, and Triton's own look-up about as long.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from gossamer.errors import InvalidOptionError, UnsupportedShapeError
from gossamer.kernels.rehearsal import under_way

PIECE_LARGEST = 4096
PIECES_LARGEST = 32  # every piece is unrolled code
WARP = 32
WARPS_LARGEST = 16
LOAD_VALUES = 8


@dataclass(frozen=True)
class Pieces:
    """A row as `count` tiles of `block` values, `block` a power of two."""

    block: int
    count: int


NO_PIECES = Pieces(1, 0)


def pieces(width: int) -> Pieces:
    """The fewest equal power-of-two pieces of a row."""
    block = min(width & -width, PIECE_LARGEST)
    if width < 1 or width // block > PIECES_LARGEST:
        raise UnsupportedShapeError(
            f"the Triton pointwise kernels cannot take rows of {width} values",
            f"a row must be at most {PIECES_LARGEST} pieces of one power of two, at most {PIECE_LARGEST} each",
            "use the torch backend for this model; the widths of FLUX, 3072 and 12288, fit",
        )
    return Pieces(block, width // block)


def power_of_two(least: int) -> int:
    """The smallest power of two that is at least `least`."""
    return 1 << max(least - 1, 0).bit_length()


def warps(values: int, values_a_thread: int, piece: int) -> int:
    """Warps of a program that holds `values` values in registers, about `values_a_thread` in each thread.

    No more than read a piece in loads of 8 values: 16 bytes of bfloat16.
    """
    wanted = power_of_two(-(-values // (WARP * values_a_thread)))
    return min(wanted, WARPS_LARGEST, max(1, piece // (WARP * LOAD_VALUES)))


@dataclass(frozen=True)
class HeadTiles:
    """The heads of a token as `count` tiles of (`heads`, dim)."""

    heads: int
    count: int


HEAD_TILE_VALUES = 1024  # one load in each of 128 threads


def head_tiles(heads: int, dim: int) -> HeadTiles:
    """The fewest equal power-of-two tiles of a token's heads."""
    if dim & (dim - 1) or not 2 <= dim <= HEAD_TILE_VALUES:
        raise UnsupportedShapeError(
            f"the Triton rotary kernel cannot take heads of {dim} values",
            f"a head must be a power of two from 2 to {HEAD_TILE_VALUES}",
            "use the torch backend for this model; FLUX heads have 128",
        )
    tile = min(heads & -heads, HEAD_TILE_VALUES // dim)
    return HeadTiles(tile, heads // tile)


def require_unit_stride(**tensors: torch.Tensor) -> None:
    """Refuse a tensor whose last dimension is not contiguous; the kernels take every other view."""
    for name, tensor in tensors.items():
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise InvalidOptionError(
                f"{name} has stride {tensor.stride(-1)} along its last dimension",
                "the Triton pointwise kernels read whole rows of neighbouring values",
                f"make {name} contiguous along its last dimension, or use the torch backend",
            )


def require_shape(shape: tuple[int, ...], **tensors: torch.Tensor) -> None:
    """Refuse a tensor of another shape: a kernel would read past its end."""
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shape:
            raise UnsupportedShapeError(
                f"{name} has shape {tuple(tensor.shape)} where {shape} is needed",
                "the Triton pointwise kernels do not broadcast",
                f"give {name} the shape {shape}",
            )


@dataclass(frozen=True)
class Plan:
    """What a kernel is launched with besides its tensors; `registers` are the most of a thread."""

    grid: tuple[int, int, int]
    numbers: tuple[float | None, ...]  # the parameters behind the tensors, in their order
    warps: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What Triton compiles with."""
        return {"num_warps": self.warps, **({} if self.registers is None else {"maxnreg": self.registers})}


class Launch:
    """A plan and, from its first run on, the machine code that Triton made for it."""

    def __init__(self, kernel: Any, plan: Plan, device: int) -> None:
        self._kernel = kernel
        self._plan = plan
        self._device = device
        self._run: Callable[..., object] | None = None  # stays None in Triton's interpreter

    def __call__(self, *tensors: object) -> None:
        """Run the kernel on tensors, or descriptors of them, of the layouts that the plan was made for.

        In a rehearsal it does not run unless its machine code is there.
        """
        plan = self._plan
        with torch.cuda.device(self._device):
            if self._run is not None:
                self._run(*tensors, *plan.numbers)
                return
            rehearsal = under_way()
            if rehearsal is not None:
                rehearsal.ask(self._kernel, plan.grid, *tensors, *plan.numbers, **plan.options)
                return
            compiled = self._kernel[plan.grid](*tensors, *plan.numbers, **plan.options)
            self._run = compiled[plan.grid] if compiled is not None else None


LAUNCHES_LARGEST = 1024  # kept by a launcher: dozens of resolutions

Layout = tuple[Hashable, ...]


def layout(tensor: torch.Tensor | None) -> Layout | None:
    """All that checks and machine code depend on; Triton compiles for addresses that 16 divides, or for any."""
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16


class Launcher:
    """The launches of one kernel by the layouts of its inputs. It keeps no tensor."""

    def __init__(self, kernel: Any, plan: Callable[..., Plan]) -> None:
        self._kernel = kernel
        self._plan = plan
        self._launches: dict[Hashable, Launch] = {}

    def __call__(self, *inputs: torch.Tensor | None, options: tuple[Hashable, ...] = ()) -> Launch:
        """The launch for these inputs; `plan(*inputs, *options)` refuses what does not fit."""
        device = next(tensor.get_device() for tensor in inputs if tensor is not None)  # -1 where it is no GPU
        key = (device, options, *map(layout, inputs))
        found = self._launches.get(key)
        if found is None:
            found = Launch(self._kernel, self._plan(*inputs, *options), device)
            if len(self._launches) >= LAUNCHES_LARGEST:
                self._launches.clear()
            self._launches[key] = found
        return found
