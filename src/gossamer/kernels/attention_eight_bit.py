"""Attention in eight bits, on Hopper: launch and operator. `attention_reference` is the same in torch.

    codes      q and k, normed and rotated first where `attention_normed` asks for it, to int8, v to e4m3
               (`attention_codes_kernel`)
    product    q k^T in int8, softmax in float32, P v in e4m3 (`attention_eight_bit_kernel`)

The copy engine reads codes through descriptors that the host makes: kept by address, since the allocator gives a model
the same few places at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gossamer.errors import InvalidOptionError
from gossamer.kernels.attention_codes import BLOCK, HEAD, Codes
from gossamer.kernels.attention_codes_kernel import AS_THEY_ARE, Turn, bound_codes, empty_codes, require_attendable
from gossamer.kernels.attention_eight_bit_kernel import GROUPS, NARROW_GROUPS, attention_eight_bit_kernel
from gossamer.kernels.attention_eight_bit_step import ROWS
from gossamer.kernels.operators import through_operator
from gossamer.kernels.pointwise.launch import Launcher, Plan

TILE = GROUPS.value * ROWS.value  # queries of a wide tile
SLOTS = 3  # of the ring: 96 KiB of shared memory, beside 24 for queries
WARPS = 4  # of a warpgroup

# descriptors ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Address:
    """A place in memory, which a descriptor names without keeping it alive."""

    place: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        """The place, as a tensor says it."""
        return self.place


def boxes(x: torch.Tensor, box: tuple[int, ...]) -> TensorDescriptor:
    """x, in one byte a value, as boxes for the copy engine, which gives zeros behind the last token."""
    layout = gl.NVMMASharedLayout(128, 8, len(box))
    return TensorDescriptor(Address(x.data_ptr(), x.dtype), list(x.shape), list(x.stride()), list(box), layout)


@dataclass(frozen=True)
class Boxes:
    """What the copy engine reads."""

    queries: TensorDescriptor  # of a warpgroup
    keys: TensorDescriptor  # of a step
    values: TensorDescriptor


def boxes_of(q8: torch.Tensor, k8: torch.Tensor, v8: torch.Tensor) -> Boxes:
    """Of the codes, contiguous as `empty_codes` makes them."""
    return Boxes(boxes(q8, (1, 1, ROWS.value, HEAD)), boxes(k8, (1, 1, BLOCK, HEAD)), boxes(v8, (HEAD, BLOCK)))


KEPT = 256  # of each kind; a step of a model has a handful
Made = TypeVar("Made")


class ByPlace(Generic[Made]):
    """What `make` made of tensors, kept by where they lie, and how. It keeps no tensor alive."""

    def __init__(self, make: Callable[..., Made]) -> None:
        self._make = make
        self._made: dict[Hashable, Made] = {}

    def __call__(self, *tensors: torch.Tensor) -> Made:
        """`make(*tensors)`, of now or of an earlier call."""
        key = tuple([(x.data_ptr(), x.shape, x.stride(), x.dtype) for x in tensors])
        found = self._made.get(key)
        if found is None:
            found = self._make(*tensors)
            if len(self._made) >= KEPT:
                self._made.clear()
            self._made[key] = found
        return found


# launch ---------------------------------------------------------------------------------------------------------------


def _require_reachable(q: torch.Tensor) -> None:
    """Refuse memory that is on no GPU; asked of tensors that have memory only."""
    if q.device.type != "cuda":
        raise InvalidOptionError(
            f"q is on {q.device}",
            "attention in eight bits runs on NVIDIA GPUs of the Hopper generation",
            "move the model there, or use another attention backend",
        )


def cut(tiles: int, heads: int, programs: int) -> tuple[int, int]:
    """How many tiles are wide, and how many there are, for `tiles` wide ones of each head in so many programs."""
    whole = tiles * heads
    left = whole % programs
    narrow = left * GROUPS.value // NARROW_GROUPS.value
    if tiles % 2 or programs % 2 or not 0 < narrow <= programs:
        return whole, whole
    return whole - left, whole - left + narrow


def tile_numbers(shape: torch.Size, programs: int) -> tuple[float, ...]:
    """The kernel's parameters behind its tensors, for q (batch, heads, tokens, 128) and at most so many programs."""
    batch, heads, tokens, _ = shape
    tiles = -(-tokens // TILE)
    wide, total = cut(tiles, heads * batch, programs)
    return (tokens, heads, tiles, wide, total, -(-tokens // BLOCK), BLOCK, SLOTS)


def plan_attention(q: torch.Tensor) -> Plan:
    """How the kernel is launched for the codes of q, at most one program a multiprocessor."""
    _require_reachable(q)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    numbers = tile_numbers(q.shape, processors)
    return Plan((min(int(numbers[4]), processors), 1, 1), numbers, WARPS)


attention_launch = Launcher(attention_eight_bit_kernel, plan_attention)
boxes_at = ByPlace(boxes_of)


def launch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turn: Turn = AS_THEY_ARE) -> torch.Tensor:
    """Run both kernels, of q and k as `turn` norms and rotates them: (batch, tokens, heads, 128)."""
    encode, attend = bound_codes(q, k, v, turn), attention_launch(q)  # what does not fit is refused before either runs
    codes = empty_codes(q)
    encode(q, k, v, *turn.tensors, *codes)
    batch, heads, tokens, head = q.shape
    out = torch.empty((batch, tokens, heads, head), dtype=q.dtype, device=q.device)
    attend(*_arguments(codes), out, codes.q_scales, codes.k_scales, codes.exponents)
    return out


def _arguments(codes: Codes) -> tuple[TensorDescriptor, ...]:
    made = boxes_at(codes.q8, codes.k8, codes.v8)
    return made.queries, made.keys, made.values


@torch.library.custom_op("gossamer::attend_eight_bit", mutates_args=())
def attend_eight_bit_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Opaque to torch.compile."""
    return launch_attention(q, k, v)


@attend_eight_bit_op.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return q.new_empty(q.transpose(1, 2).shape)


def attend_eight_bit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`attend_in_torch` in two passes; the result is a view of (batch, tokens, heads, 128), for q, k, v in bf16.

    (batch, heads, tokens, 128) each. Queries and keys are rounded to int8, probabilities and values to e4m3.
    """
    run = launch_attention
    if through_operator(q):
        require_attendable(q, k, v)
        run = attend_eight_bit_op
    return run(q, k, v).transpose(1, 2)
