"""Attention with probabilities and values in eight bits, on Hopper: launch and operator. `attention_reference` is the
same in torch.

    values    v to e4m3 with one power of two for every 128 keys (`attention_values_kernel`)
    product   exact logits, softmax, P v in e4m3 (`attention_fp8_kernel`)

The copy engine reads q and k where they are, through descriptors that the host makes: kept by address, since a model
has its queries in few different places. It takes addresses and strides that 16 bytes divide. A FLUX block has no other
ones: its buffer is a tensor of its own, and all of its parts are whole heads of 256 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gossamer.errors import InvalidOptionError, UnsupportedShapeError
from gossamer.kernels.attention_fp8_kernel import GROUPS, attention_fp8_kernel
from gossamer.kernels.attention_fp8_step import ROWS
from gossamer.kernels.attention_values import BLOCK, HEAD
from gossamer.kernels.attention_values_kernel import empty_values, values_launch
from gossamer.kernels.operators import through_operator
from gossamer.kernels.pointwise.launch import Launch, Launcher, Plan, require_unit_stride

TILE = GROUPS.value * ROWS.value  # queries of a program
SLOTS = 3  # of the ring: 144 KiB of shared memory, beside 32 for queries
WARPS = 4  # of a warpgroup
COPY_BYTES = 16  # divide all that the copy engine reads
LOG2_SCALE = math.log2(math.e) / math.sqrt(HEAD)

# descriptors ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Address:
    """A place in memory, which a descriptor names without keeping it alive."""

    place: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        """The place, as a tensor says it."""
        return self.place


def boxes(x: torch.Tensor, box: tuple[int, ...], swizzled: int, bits: int) -> TensorDescriptor:
    """x as boxes for the copy engine, which gives zeros behind the last token."""
    layout = gl.NVMMASharedLayout(swizzled, bits, len(box))
    return TensorDescriptor(Address(x.data_ptr(), x.dtype), list(x.shape), _steps(x), list(box), layout)


def _steps(x: torch.Tensor) -> list[int]:
    """The strides of x. Where there is nothing to step to, torch may have any number; the copy engine gets a head."""
    sizes = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    return [*(stride if size > 1 else HEAD for size, stride in sizes), 1]


def query_boxes(q: torch.Tensor) -> TensorDescriptor:
    """The queries of a warpgroup; q (batch, heads, tokens, 128) in bf16."""
    return boxes(q, (1, 1, ROWS.value, HEAD), swizzled=128, bits=16)


def key_boxes(k: torch.Tensor) -> TensorDescriptor:
    """The keys of a step; k (batch, heads, tokens, 128) in bf16."""
    return boxes(k, (1, 1, BLOCK, HEAD), swizzled=128, bits=16)


def code_boxes(codes: torch.Tensor) -> TensorDescriptor:
    """The values of a step; codes (batch * heads * 128, padded tokens) in e4m3."""
    return boxes(codes, (HEAD, BLOCK), swizzled=128, bits=8)


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


def require_attendable(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Refuse shapes, types and strides that the kernels cannot take."""
    if q.ndim != 4 or not q.shape == k.shape == v.shape or q.shape[-1] != HEAD or 0 in q.shape:
        raise UnsupportedShapeError(
            f"q, k and v of shapes {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)} cannot be attended here",
            f"attention with values in eight bits takes (batch, heads, tokens, {HEAD}), none empty, the same of each",
            "use another attention backend",
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != torch.bfloat16:
            raise InvalidOptionError(
                f"{name} has type {x.dtype}",
                "attention with values in eight bits takes torch.bfloat16",
                f"convert {name}, or use another attention backend",
            )
    require_unit_stride(q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k)):
        if any(step * x.element_size() % COPY_BYTES for step in _steps(x)[:-1]):
            raise InvalidOptionError(
                f"{name} has strides {x.stride()}",
                f"the copy engine takes strides that {COPY_BYTES} bytes divide, which is {COPY_BYTES // 2} values",
                f"make {name} contiguous, or use another attention backend",
            )


def _require_reachable(q: torch.Tensor, k: torch.Tensor) -> None:
    """Refuse memory that the copy engine cannot read; asked of tensors that have memory only."""
    for name, x in (("q", q), ("k", k)):
        if x.device.type != "cuda":
            raise InvalidOptionError(
                f"{name} is on {x.device}",
                "attention with values in eight bits runs on NVIDIA GPUs of the Hopper generation",
                "move the model there, or use another attention backend",
            )
        if x.data_ptr() % COPY_BYTES:
            raise InvalidOptionError(
                f"{name} begins {x.data_ptr() % COPY_BYTES} bytes behind a multiple of {COPY_BYTES}",
                f"the copy engine takes addresses that {COPY_BYTES} bytes divide",
                f"make {name} a tensor of its own, or use another attention backend",
            )


def tile_numbers(shape: torch.Size) -> tuple[float, ...]:
    """The kernel's parameters behind its tensors, for q (batch, heads, tokens, 128)."""
    batch, heads, tokens, _ = shape
    tiles = -(-tokens // TILE)
    return (LOG2_SCALE, tokens, heads, tiles, tiles * heads * batch, -(-tokens // BLOCK), BLOCK, SLOTS)


def plan_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Plan:
    """How the kernel is launched, at most one program a multiprocessor; refuses what does not fit."""
    require_attendable(q, k, v)
    _require_reachable(q, k)
    numbers = tile_numbers(q.shape)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    return Plan((min(int(numbers[4]), processors), 1, 1), numbers, WARPS)


attention_launch = Launcher(attention_fp8_kernel, plan_attention)


@dataclass(frozen=True)
class Bound:
    """Both launches for q, k and v where they are."""

    values: Launch
    attention: Launch
    queries: TensorDescriptor
    keys: TensorDescriptor


def bind(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Bound:
    """Refuses what does not fit."""
    attention = attention_launch(q, k, v)
    return Bound(values_launch(v), attention, query_boxes(q), key_boxes(k))


bound_at = ByPlace(bind)
code_boxes_at = ByPlace(code_boxes)


def launch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Run both kernels: (batch, tokens, heads, 128)."""
    bound = bound_at(q, k, v)
    codes, exponents = empty_values(v)
    bound.values(v, codes, exponents)
    batch, heads, tokens, head = q.shape
    out = torch.empty((batch, tokens, heads, head), dtype=q.dtype, device=q.device)
    bound.attention(bound.queries, bound.keys, code_boxes_at(codes), out, exponents)
    return out


@torch.library.custom_op("gossamer::attend_fp8_values", mutates_args=())
def attend_fp8_values_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Opaque to torch.compile."""
    return launch_attention(q, k, v)


@attend_fp8_values_op.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return q.new_empty(q.transpose(1, 2).shape)


def attend_fp8_values(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`attend_in_torch` in two passes; the result is a view of (batch, tokens, heads, 128), for q, k, v in bf16.

    (batch, heads, tokens, 128) each. Logits are exact; probabilities and values are rounded to e4m3.
    """
    run = launch_attention
    if through_operator(q):
        require_attendable(q, k, v)
        run = attend_fp8_values_op
    return run(q, k, v).transpose(1, 2)
