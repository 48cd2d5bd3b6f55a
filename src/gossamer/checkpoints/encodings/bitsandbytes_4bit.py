"""NF4 and FP4 as bitsandbytes saves them: in Forge's single files and in folders of diffusers and transformers.

    tensor                                    dtype  shape
    x.weight                                  U8     (ceil(out * in / 2), 1); or as many bytes of another type
    x.weight.absmax                           F32    (blocks,), or U8 where the block scales are quantised too
    x.weight.quant_map                        F32    (16,), the values by code
    x.weight.nested_absmax                    F32    (ceil(blocks / nested_blocksize),)
    x.weight.nested_quant_map                 F32    (256,), the block scales by code
    x.weight.quant_state.bitsandbytes__nf4    U8     JSON: {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16",
    (or __fp4)                                       "shape": [out, in], "nested_blocksize": 256, "nested_dtype":
                                                     "float32", "nested_offset": 0.02}

The bytes are those of formats nf4, fp4, nf4-dq and fp4-dq. Blocks of more than 64 values are held exactly by repeating
their scale, and quantised block scales with another map or block size by decoding them to float32. Blocks of 32 are
decoded to a float32 weight. bitsandbytes decodes with the standard values whatever `quant_map` says, so a file with
others is refused.

Source: QuantState.from_dict and .as_dict in bitsandbytes/functional.py, version 0.50.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from gossamer.checkpoints.encodings.encoding import Encoding
from gossamer.checkpoints.encodings.small_json import MOST_BYTES, parse_object
from gossamer.checkpoints.encodings.stored import FLOATS, damage, entry_of, read_floats, read_shaped, unknown
from gossamer.checkpoints.safetensors_file import DTYPE_BITS
from gossamer.checkpoints.source import TensorSource
from gossamer.formats import Packed, unpack
from gossamer.formats.dynamic_map import dynamic_map
from gossamer.formats.four_bit import BLOCK, NESTED_BLOCK, VALUES

STATE = ".quant_state.bitsandbytes__"
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
MAP_TOLERANCE = 1e-6  # what bitsandbytes takes for equal


@dataclass(frozen=True)
class _State:
    """What the JSON says, checked: `blocks` is the number of block scales."""

    kind: str
    shape: tuple[int, int]
    block: int
    nested_block: int | None
    nested_offset: float

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        return -(-self.count // self.block)


def find(source: TensorSource, names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Weights with a `quant_state`."""
    states = (
        (name.rpartition(STATE)[0], name) for name in names if name.endswith(tuple(STATE + kind for kind in VALUES))
    )
    found: dict[str, tuple[str, ...]] = {}
    for weight, state in states:
        if weight in names:
            parts = (*(weight + part for part in PARTS), state)
            found[weight] = (*found.get(weight, (weight,)), *(part for part in parts if part in names))
    return {weight: tuple(dict.fromkeys(parts)) for weight, parts in found.items()}


def read(source: TensorSource, weight: str) -> Packed | torch.Tensor:
    """The stored bytes as nf4, fp4, nf4-dq or fp4-dq; blocks of 32 decoded to float32."""
    state = _read_state(source, weight)
    codes = _read_codes(source, weight, state)
    _require_standard_map(source, weight, state)
    if state.nested_block is None:
        absmax = read_floats(source, weight, weight + ".absmax", (state.blocks,), (state.blocks, 1))
        return _pack(state, codes, absmax)
    nested = _read_nested(source, weight, state)
    if state.block == BLOCK and state.nested_block == NESTED_BLOCK and _has_standard_nested_map(source, weight):
        return Packed(f"{state.kind}-dq", {"codes": codes, **nested}, state.shape)
    return _pack(state, codes, _decode_nested(source, weight, state, nested))


# the description


def _read_state(source: TensorSource, weight: str) -> _State:
    names = [weight + STATE + kind for kind in VALUES if weight + STATE + kind in source.entries]
    if len(names) != 1:
        raise damage(weight, f"{len(names)} tensors describe its quantisation; one was expected.")
    entry = entry_of(source, weight, names[0], ("U8", "I8"))
    if len(entry.shape) != 1 or entry.shape[0] > MOST_BYTES:
        raise damage(
            weight, f"Its quant_state has the shape {list(entry.shape)}; at most {MOST_BYTES} bytes are allowed."
        )
    try:
        content = parse_object(source.read(names[0]).view(torch.uint8).numpy().tobytes())
    except ValueError as error:
        raise damage(weight, f"Its quant_state is wrong: {error}.") from error
    kind = names[0].rpartition(STATE)[2]
    if content.get("quant_type") != kind:
        raise damage(weight, f"Its quant_state says {str(content.get('quant_type'))[:40]!r} under the name of {kind}.")
    nested = weight + ".nested_absmax" in source.entries
    return _State(
        kind,
        _shape(weight, content),
        _block_size(weight, content, "blocksize", BLOCK_SIZES),
        _block_size(weight, content, "nested_blocksize", NESTED_BLOCK_SIZES) if nested else None,
        _nested_offset(weight, content) if nested else 0.0,
    )


def _shape(weight: str, content: dict[str, Any]) -> tuple[int, int]:
    shape = content.get("shape")
    sizes = shape if isinstance(shape, list) and len(shape) == 2 else [0, 0]
    if not all(type(size) is int and 0 < size < 2**31 for size in sizes):
        raise damage(weight, f"Its quant_state gives the shape {str(shape)[:60]}; that of a matrix was expected.")
    return sizes[0], sizes[1]


def _block_size(weight: str, content: dict[str, Any], key: str, allowed: tuple[int, ...]) -> int:
    value = content.get(key)
    if type(value) is not int or value not in allowed:
        raise damage(weight, f"Its {key} is {str(value)[:40]}; bitsandbytes has {', '.join(map(str, allowed))}.")
    return value


def _nested_offset(weight: str, content: dict[str, Any]) -> float:
    if content.get("nested_dtype") != "float32":
        raise unknown(
            weight,
            f"block scales of type {str(content.get('nested_dtype'))[:40]!r}",
            "bitsandbytes writes float32 here, and another type would round them.",
        )
    offset: Any = content.get("nested_offset")
    is_number = isinstance(offset, int | float) and not isinstance(offset, bool)
    if not is_number or not abs(offset) < torch.finfo(torch.float32).max:
        raise damage(weight, f"Its nested_offset is {str(offset)[:40]!r}, not a finite number.")
    return float(offset)


# the tensors


def _read_codes(source: TensorSource, weight: str, state: _State) -> torch.Tensor:
    """Bytes (ceil(out * in / 2),). Other types only carry bytes: `bnb_4bit_quant_storage` chooses them."""
    entry = entry_of(source, weight, weight, ("U8", "I8", *FLOATS))
    nbytes = math.prod(entry.shape) * DTYPE_BITS[entry.dtype] // 8
    if nbytes != -(-state.count // 2):
        raise damage(weight, f"It has {nbytes} bytes; {list(state.shape)} takes {-(-state.count // 2)}.")
    return source.read(weight).reshape(-1).view(torch.uint8)


def _require_standard_map(source: TensorSource, weight: str, state: _State) -> None:
    values = read_floats(source, weight, weight + ".quant_map", (16,))
    if not torch.allclose(values, torch.tensor(VALUES[state.kind]), rtol=0, atol=MAP_TOLERANCE):
        raise unknown(
            weight, f"{state.kind} with other values than the standard ones", "Its quant_map differs from them."
        )


def _has_standard_nested_map(source: TensorSource, weight: str) -> bool:
    return torch.equal(_nested_map(source, weight), dynamic_map(torch.device("cpu")))


def _nested_map(source: TensorSource, weight: str) -> torch.Tensor:
    return read_floats(source, weight, weight + ".nested_quant_map", (256,))


def _read_nested(source: TensorSource, weight: str, state: _State) -> dict[str, torch.Tensor]:
    groups = -(-state.blocks // (state.nested_block or 1))
    codes = read_shaped(source, weight, weight + ".absmax", ("U8",), ((state.blocks,), (state.blocks, 1)))
    return {
        "absmax_codes": codes.reshape(-1),
        "absmax_scale": read_floats(source, weight, weight + ".nested_absmax", (groups,), (groups, 1)),
        "absmax_offset": torch.tensor([state.nested_offset]),
    }


def _decode_nested(source: TensorSource, weight: str, state: _State, nested: dict[str, torch.Tensor]) -> torch.Tensor:
    """Block scales (blocks,) in the order of operations of bitsandbytes: map times scale, then the offset."""
    scale = nested["absmax_scale"].repeat_interleave(state.nested_block or 1)[: state.blocks]
    values = _nested_map(source, weight).index_select(0, nested["absmax_codes"].int())
    return values.mul_(scale).add_(nested["absmax_offset"])


def _pack(state: _State, codes: torch.Tensor, absmax: torch.Tensor) -> Packed | torch.Tensor:
    """Blocks of any size by float32 scales of blocks of 64, if they are not smaller."""
    if state.block < BLOCK:
        return _decode_small_blocks(state, codes, absmax)
    blocks = -(-state.count // BLOCK)
    repeated = absmax if state.block == BLOCK else absmax.repeat_interleave(state.block // BLOCK)[:blocks].contiguous()
    return Packed(state.kind, {"codes": codes, "absmax": repeated}, state.shape)


def _decode_small_blocks(state: _State, codes: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """The codes' values in blocks of 64 of scale 1, then the real scales."""
    ones = torch.ones(-(-state.count // BLOCK))
    flat = unpack(Packed(state.kind, {"codes": codes, "absmax": ones}, state.shape), torch.float32).view(-1)
    whole = state.count - state.count % state.block
    flat[:whole].view(-1, state.block).mul_(absmax[: whole // state.block, None])
    flat[whole:].mul_(absmax[whole // state.block :])
    return flat.view(state.shape)


ENCODING = Encoding("bitsandbytes 4-bit", find, read)
