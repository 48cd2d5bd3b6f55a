"""Weights that ComfyUI describes layer by layer: by a marker tensor of JSON, or in the header's metadata.

    x.comfy_quant            U8 (n,): {"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 256}
    _quantization_metadata   header text: {"layers": {"x": {"format": "nvfp4"}, ...}}; the layers' names may lack the
                             prefix that the tensors have

    format                          comes back as
    float8_e4m3fn, float8_e5m2      fp8, fp8_e5m2: same numbers
    float8_e4m3fn_rowwise           fp8: same numbers
    int8_tensorwise                 int8: same numbers; rotated (convrot): float32
    nvfp4, mxfp8                    float32
    convrot_w4a4, asym_w4a8_int8    float32
    awq_w4a16                       float32
    float8_e4m3fn_blockwise, int8_blockwise   float32

`pre_quant_scale`, which scales a layer's input, is multiplied into the columns, and the weight is float32 then.
`input_scale` is a scale of activations, which Gossamer does not need. Settings that are not known are refused: one
might change what the numbers mean.

Source: QUANT_ALGOS in ComfyUI's comfy/quant_ops.py and _load_quantized_module in comfy/ops.py (the version of September
2026); the last line and the name "rowwise" are those of convert_to_quant.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any

import torch

from gossamer.checkpoints.encodings import grouped, mxfp8, nvfp4, rotated, scaled_fp8
from gossamer.checkpoints.encodings.encoding import Encoding, beside
from gossamer.checkpoints.encodings.small_json import MOST_BYTES, parse_object
from gossamer.checkpoints.encodings.stored import damage, entry_of, matrix_of, unknown
from gossamer.checkpoints.layouts import PREFIXES
from gossamer.checkpoints.source import TensorSource
from gossamer.errors import FileDamagedError
from gossamer.formats import Packed, unpack

MARKER = "comfy_quant"
METADATA = "_quantization_metadata"
MOST_METADATA_BYTES = 1 << 20  # five hundred layers take 30 to 70 kB

SCALES = ("weight_scale", "weight_scale_2", "weight_s_rel", "weight_s_channel", "weight_codebook", "weight_correction")
SIDES = (MARKER, *SCALES, "weight_zeros", "input_scale", "pre_quant_scale")

ANY_SIDES = (MARKER, "input_scale", "pre_quant_scale")
ANY_SETTINGS = (
    *("format", "params", "orig_dtype", "orig_shape", "per_row"),
    *("full_precision_matrix_mult", "input_scale_calibrated"),
)


@dataclass(frozen=True)
class _Layer:
    """A weight in its file, and what is said of it."""

    source: TensorSource
    weight: str
    settings: Mapping[str, Any]

    def size(self, key: str, default: int) -> int:
        """A whole number of the description."""
        value = self.settings.get(key, default)
        if type(value) is not int or not 0 < value < 2**31:
            raise damage(self.weight, f"Its {key} is {str(value)[:40]!r}, not a whole number from 1 on.")
        return value

    def flag(self, key: str) -> bool:
        """A yes or no of the description."""
        value = self.settings.get(key, False)
        if not isinstance(value, bool):
            raise damage(self.weight, f"Its {key} is {str(value)[:40]!r}, neither true nor false.")
        return value


@dataclass(frozen=True)
class _Format:
    """How a format is read, and which tensors and settings it may have beside those of every format."""

    read: Callable[[_Layer], Packed | torch.Tensor]
    sides: tuple[str, ...] = ("weight_scale",)
    settings: tuple[str, ...] = ()


def find(source: TensorSource, names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Weights with a marker, or named in the metadata."""
    described = _described(source)
    weights = (name for name in names if name.endswith(".weight"))
    return {
        weight: beside(weight, SIDES, names)
        for weight in weights
        if weight.removesuffix("weight") + MARKER in names or _layer_in(described, weight) is not None
    }


def read(source: TensorSource, weight: str) -> Packed | torch.Tensor:
    """The weight as its description says."""
    layer = _Layer(source, weight, _settings(source, weight))
    found = _known_format(layer).read(layer)
    if weight.removesuffix("weight") + "pre_quant_scale" not in source.entries:
        return found
    return nvfp4.scale_columns(source, weight, unpack(found, torch.float32) if isinstance(found, Packed) else found)


# the description


def _described(source: TensorSource) -> Mapping[str, Any]:
    """Descriptions of the metadata by layer."""
    return _parse_layers(source.metadata[METADATA]) if METADATA in source.metadata else {}


@lru_cache(maxsize=1)  # the same text is asked about for every weight of a file, and may take 0.1 s to parse
def _parse_layers(text: str) -> Mapping[str, Any]:
    try:
        layers = parse_object(text.encode(), MOST_METADATA_BYTES).get("layers")
        if not isinstance(layers, dict):
            raise ValueError("it has no table of layers")
    except ValueError as error:
        raise FileDamagedError(
            "The header's description of quantised layers cannot be read.",
            f"{METADATA}: {error}.",
            "Download or copy the file again and compare its SHA-256 with the one that the source states.",
        ) from error
    return MappingProxyType(layers)


def _layer_in(described: Mapping[str, Any], weight: str) -> str | None:
    """The name under which the metadata describes a weight: with its prefix, or without."""
    layer = weight.removesuffix(".weight")
    spellings = (layer, *(layer.removeprefix(prefix) for prefix, _ in PREFIXES if layer.startswith(prefix)))
    return next((spelling for spelling in spellings if spelling in described), None)


def _settings(source: TensorSource, weight: str) -> dict[str, Any]:
    """The one description of a weight; the older spelling with `params` is made like the newer one."""
    described = _described(source)
    layer, marker = _layer_in(described, weight), weight.removesuffix("weight") + MARKER
    settings = described[layer] if layer is not None else None
    if marker in source.entries:
        of_marker = _parse_marker(source, weight, marker)
        if settings is not None and settings != of_marker:
            raise damage(weight, f"{marker[:80]!r} and the metadata of the file describe it differently.")
        settings = of_marker
    if not isinstance(settings, dict):
        raise damage(weight, "Its description is not an object.")
    params = settings.get("params", {})
    return {**(params if isinstance(params, dict) else {}), **settings}


def _parse_marker(source: TensorSource, weight: str, marker: str) -> dict[str, Any]:
    entry = entry_of(source, weight, marker, ("U8", "I8"))
    if len(entry.shape) != 1 or entry.shape[0] > MOST_BYTES:
        raise damage(
            weight, f"{marker[:80]!r} has the shape {list(entry.shape)}; at most {MOST_BYTES} bytes are allowed."
        )
    try:
        return parse_object(source.read(marker).view(torch.uint8).numpy().tobytes())
    except ValueError as error:
        raise damage(weight, f"{marker[:80]!r} is wrong: {error}.") from error


def _known_format(layer: _Layer) -> _Format:
    source, weight, settings = layer.source, layer.weight, layer.settings
    name = settings.get("format")
    if not isinstance(name, str):
        raise damage(weight, "Its description names no format.")
    if name not in FORMATS:
        raise unknown(weight, repr(name[:60]), f"Gossamer reads {', '.join(FORMATS)}.")
    known = FORMATS[name]
    odd = [str(key)[:40] for key in settings if key not in (*ANY_SETTINGS, *known.settings)]
    if odd:
        raise unknown(
            weight, f"{name} with {', '.join(odd[:5])}", "What this setting does to the numbers is not known."
        )
    idle = [side for side in beside(weight, SIDES, source.entries) if side != weight]
    idle = [side for side in idle if side.rpartition(".")[2] not in (*ANY_SIDES, *known.sides)]
    if idle:
        raise unknown(weight, f"{name} with {', '.join(idle)[:160]}", f"{name} does not use such a tensor.")
    return known


# the formats


def _read_rows(layer: _Layer, dtype: str) -> Packed:
    """Codes with a scale for the matrix or by row."""
    matrix_of(layer.source, layer.weight, (dtype,))
    return scaled_fp8.read_scaled(layer.source, layer.weight, layer.weight.removesuffix("weight") + "weight_scale")


def _read_int8(layer: _Layer) -> Packed | torch.Tensor:
    if layer.flag("convrot"):
        return rotated.read_int8(layer.source, layer.weight, layer.size("convrot_groupsize", 256))
    return _read_rows(layer, "I8")


def _read_w4a4(layer: _Layer) -> torch.Tensor:
    return rotated.read_w4a4(layer.source, layer.weight, layer.size("convrot_groupsize", 256))


def _read_w4a8(layer: _Layer) -> torch.Tensor:
    size, group = layer.size("convrot_groupsize", 256), layer.size("group_size", 16)
    return rotated.read_w4a8(layer.source, layer.weight, size, group)


def _read_blockwise(layer: _Layer, dtype: str, group: int) -> torch.Tensor:
    return grouped.read_blockwise(layer.source, layer.weight, dtype, layer.size("group_size", group))


def _read_awq(layer: _Layer) -> torch.Tensor:
    return grouped.read_awq(layer.source, layer.weight, layer.size("group_size", 64))


def _read_tiled(layer: _Layer, read: Callable[[TensorSource, str], torch.Tensor], block: int) -> torch.Tensor:
    """Blocks of a fixed size, without the rows and columns that were added to fill them, where the description says."""
    if layer.size("group_size", block) != block:
        raise damage(layer.weight, f"Its group_size is {layer.settings['group_size']}; this format has {block}.")
    decoded, shape = read(layer.source, layer.weight), layer.settings.get("orig_shape")
    if shape is None:
        return decoded
    sizes = (
        shape if isinstance(shape, list) and len(shape) == 2 and all(type(size) is int for size in shape) else [0, 0]
    )
    if not all(size > 0 and 0 <= stored - size < 32 for size, stored in zip(sizes, decoded.shape, strict=True)):
        raise damage(layer.weight, f"Its orig_shape is {str(shape)[:60]}; {list(decoded.shape)} is stored.")
    return decoded[: sizes[0], : sizes[1]].contiguous()


FORMATS: Mapping[str, _Format] = {
    "float8_e4m3fn": _Format(partial(_read_rows, dtype="F8_E4M3")),
    "float8_e5m2": _Format(partial(_read_rows, dtype="F8_E5M2")),
    "float8_e4m3fn_rowwise": _Format(partial(_read_rows, dtype="F8_E4M3")),
    "float8_e4m3fn_blockwise": _Format(partial(_read_blockwise, dtype="F8_E4M3", group=64), settings=("group_size",)),
    "int8_tensorwise": _Format(_read_int8, settings=("convrot", "convrot_groupsize")),
    "int8_blockwise": _Format(partial(_read_blockwise, dtype="I8", group=128), settings=("group_size",)),
    "nvfp4": _Format(
        partial(_read_tiled, read=nvfp4.read_tiled, block=nvfp4.BLOCK),
        sides=("weight_scale", "weight_scale_2"),
        settings=("group_size",),
    ),
    "mxfp8": _Format(partial(_read_tiled, read=mxfp8.read_tiled, block=mxfp8.BLOCK), settings=("group_size",)),
    "convrot_w4a4": _Format(_read_w4a4, settings=("convrot_groupsize", "linear_dtype")),
    "asym_w4a8_int8": _Format(
        _read_w4a8,
        sides=("weight_s_rel", "weight_s_channel", "weight_codebook", "weight_correction"),
        settings=("convrot_groupsize", "group_size"),
    ),
    "awq_w4a16": _Format(_read_awq, sides=("weight_scale", "weight_zeros"), settings=("group_size",)),
}

ENCODING = Encoding("comfy_quant", find, read)
