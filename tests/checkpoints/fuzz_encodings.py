"""Checkpoints whose encoded weights lie, without end: none may raise anything but a GossamerError, or be slow.

    python tests/checkpoints/fuzz_encodings.py --cases 100000 [--seed 0]

Each case is one layer in one encoding, sound but for about one thing: a setting or the text of its JSON, a shape, a
dtype, a value, a tensor that is missing, added or put under another name. What is not refused is decoded whole. Files
that fail this are kept in the current folder.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fuzz_headers import MOST_BYTES, ODD_JSON, outcome

from gossamer.checkpoints.encodings import find_encoded, read_encoded
from gossamer.checkpoints.encodings.tiled_scales import tiled_shape
from gossamer.checkpoints.safetensors_file import DTYPE_BITS, read_header
from gossamer.formats import Packed, unpack
from gossamer.formats.dynamic_map import dynamic_map
from gossamer.formats.four_bit import VALUES

EXPECTED = ("sound", "file-damaged", "unknown-storage")
METADATA = "_quantization_metadata"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SETTINGS = (
    *("format", "params", "group_size", "convrot", "convrot_groupsize", "orig_shape", "linear_dtype"),
    *("quant_type", "blocksize", "shape", "dtype", "nested_blocksize", "nested_dtype", "nested_offset"),
)
SUFFIXES = (
    *("weight", "weight_scale", "weight_scale_2", "scale_weight", "input_scale", "pre_quant_scale", "SCB"),
    *("weight_s_rel", "weight_s_channel", "weight_codebook", "weight_correction", "weight_zeros", "weight_format"),
    *("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", "comfy_quant"),
    *("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4", "scaled_fp8", "bias"),
)
TEXTS = (b"", b"{", b"[" * 3000, b"{}", b"null", b'"nvfp4"', b"\xff\xfe", b'{"a":1,"a":2}', b"1" * 5000, b'{"x":NaN}')


@dataclass
class Layer:
    """Tensors by role with dtype, shape and bytes; JSON that goes into the tensor `json_role`, or into the metadata."""

    tensors: dict[str, tuple[str, list[int], bytes]]
    settings: dict[str, Any] = field(default_factory=dict)
    json_role: str | None = None
    text: bytes | None = None  # instead of the settings


# sound layers


def _tensor(rng: random.Random, dtype: str, *shape: int) -> tuple[str, list[int], bytes]:
    """Random codes; small positive numbers where the type is a float."""
    count = math.prod(shape)
    if dtype in ("F32", "F16", "BF16"):
        values = torch.tensor([rng.uniform(0.01, 2) for _ in range(count)]).to(DTYPES[dtype])
        return dtype, list(shape), values.view(torch.uint8).numpy().tobytes() if count else b""
    # the exponent of NaN is left out of scales in fp8
    return dtype, list(shape), bytes(rng.randrange(0x78) for _ in range(count))


def _numbers(values: Any) -> tuple[str, list[int], bytes]:
    values = torch.as_tensor(values, dtype=torch.float32)
    return "F32", list(values.shape), values.numpy().tobytes()


def _comfy(tensors: dict[str, Any], **settings: Any) -> Layer:
    return Layer(tensors, settings, "comfy_quant")


def _scaled(rng: random.Random) -> Layer:
    dtype = rng.choice(("F8_E4M3", "F8_E5M2", "I8"))
    scale = _tensor(rng, rng.choice(("F32", "BF16")), *rng.choice(((), (1,), (6,), (6, 1))))
    return Layer({"weight": _tensor(rng, dtype, 6, 8), rng.choice(("weight_scale", "scale_weight")): scale})


def _rows(rng: random.Random) -> Layer:
    name, dtype = rng.choice((("float8_e4m3fn", "F8_E4M3"), ("float8_e5m2", "F8_E5M2"), ("int8_tensorwise", "I8")))
    scale = _tensor(rng, "F32", *rng.choice(((), (6,), (6, 1))))
    return _comfy({"weight": _tensor(rng, dtype, 6, 8), "weight_scale": scale}, format=name)


def _rotated(rng: random.Random) -> Layer:
    tensors = {"weight": _tensor(rng, "I8", 6, 32), "weight_scale": _tensor(rng, "F32", 6, 1)}
    return _comfy(tensors, format="int8_tensorwise", convrot=True, convrot_groupsize=16)


def _w4a4(rng: random.Random) -> Layer:
    tensors = {"weight": _tensor(rng, "I8", 6, 16), "weight_scale": _tensor(rng, "F32", 6)}
    return _comfy(tensors, format="convrot_w4a4", convrot_groupsize=16)


def _w4a8(rng: random.Random) -> Layer:
    tensors = {
        "weight": _tensor(rng, "I8", 6, 16),
        "weight_s_rel": _tensor(rng, "F8_E4M3", 6, 2),
        "weight_s_channel": _tensor(rng, "F32", 6),
        "weight_codebook": _tensor(rng, "F32", 16),
        "weight_correction": _tensor(rng, "F32", 2, 6),
    }
    return _comfy(tensors, format="asym_w4a8_int8", convrot_groupsize=16, group_size=16)


def _grouped(rng: random.Random) -> Layer:
    if rng.random() < 0.5:
        sides = {role: _tensor(rng, "BF16", 2, 6) for role in ("weight_scale", "weight_zeros")}
        return _comfy({"weight": _tensor(rng, "I8", 6, 8), **sides}, format="awq_w4a16", group_size=8)
    name, dtype = rng.choice((("float8_e4m3fn_blockwise", "F8_E4M3"), ("int8_blockwise", "I8")))
    tensors = {"weight": _tensor(rng, dtype, 6, 8), "weight_scale": _tensor(rng, "F32", 3, 4)}
    return _comfy(tensors, format=name, group_size=2)


def _nvfp4(rng: random.Random) -> Layer:
    tensors = {"weight": _tensor(rng, "U8", 6, 16), "weight_scale_2": _tensor(rng, "F32")}
    tensors["input_scale"] = _tensor(rng, "F32")
    if rng.random() < 0.5:
        return Layer(tensors | {"weight_scale": _tensor(rng, "F8_E4M3", 6, 2)})
    tensors |= {"weight_scale": _tensor(rng, "F8_E4M3", *tiled_shape(6, 2)), "pre_quant_scale": _tensor(rng, "F32", 32)}
    return _comfy(tensors, format="nvfp4", orig_shape=[5, 32])


def _mxfp8(rng: random.Random) -> Layer:
    tensors = {"weight": _tensor(rng, "F8_E4M3", 6, 64), "weight_scale": _tensor(rng, "F8_E8M0", *tiled_shape(6, 2))}
    return _comfy(tensors, format="mxfp8")


def _four_bit(rng: random.Random) -> Layer:
    kind, block = rng.choice(("nf4", "fp4")), rng.choice((32, 64, 128))
    rows, width = rng.choice(((6, 64), (5, 33), (1, 1), (3, 4)))
    blocks = -(-rows * width // block)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": [rows, width]}
    tensors = {"weight": _tensor(rng, "U8", -(-rows * width // 2), 1), "weight.quant_map": _numbers(VALUES[kind])}
    if rng.random() < 0.5:
        nested = rng.choice((64, 256))
        state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": 0.02}
        tensors["weight.absmax"] = _tensor(rng, "U8", blocks)
        tensors["weight.nested_absmax"] = _tensor(rng, "F32", -(-blocks // nested))
        tensors["weight.nested_quant_map"] = _numbers(dynamic_map(torch.device("cpu")))
    else:
        tensors["weight.absmax"] = _tensor(rng, "F32", blocks)
    return Layer(tensors, state, f"weight.quant_state.bitsandbytes__{kind}")


def _eight_bit(rng: random.Random) -> Layer:
    order = ("U8", [], b"\0")
    return Layer({"weight": _tensor(rng, "I8", 6, 8), "SCB": _tensor(rng, "F32", 6), "weight_format": order})


LAYERS = (_scaled, _rows, _rotated, _w4a4, _w4a8, _grouped, _nvfp4, _mxfp8, _four_bit, _four_bit, _eight_bit)


# mutations


def _odd_setting(rng: random.Random, layer: Layer) -> None:
    name = rng.choice((*layer.settings, rng.choice(SETTINGS)))
    value = deepcopy(rng.choice((*ODD_JSON, [6, 8], [3, 2**62], [2**31, 2**31], "nvfp4", "nf4", 16, 64, 256)))
    if isinstance(layer.settings.get(name), list) and layer.settings[name] and rng.random() < 0.5:
        layer.settings[name] = [*layer.settings[name]]
        layer.settings[name][rng.randrange(len(layer.settings[name]))] = value
    else:
        layer.settings[name] = value


def _missing_setting(rng: random.Random, layer: Layer) -> None:
    if layer.settings:
        del layer.settings[rng.choice(list(layer.settings))]


def _odd_text(rng: random.Random, layer: Layer) -> None:
    text = bytearray(json.dumps(layer.settings).encode())
    for _ in range(rng.randrange(4)):
        text[rng.randrange(len(text))] = rng.randrange(256)
    layer.text = rng.choice((bytes(text), bytes(text[: rng.randrange(len(text))]), *TEXTS))


def _odd_shape(rng: random.Random, layer: Layer) -> None:
    """Other sizes, and as many bytes as they need."""
    role = rng.choice(list(layer.tensors))
    dtype, shape, data = layer.tensors[role]
    shape = rng.choice(
        (
            [*shape[:-1]],
            [*shape, rng.choice((0, 1, 2))],
            [size + rng.choice((-1, 0, 1)) if size else 1 for size in shape],
            rng.choices((0, 1, 2, 3, 4, 6, 8, 16, 64), k=rng.randrange(5)),
        )
    )
    nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
    if nbytes < 1 << 16:
        layer.tensors[role] = dtype, shape, (data * (nbytes // max(len(data), 1) + 1))[:nbytes].ljust(nbytes, b"\1")


def _odd_dtype(rng: random.Random, layer: Layer) -> None:
    """The same number of values in another type."""
    role = rng.choice(list(layer.tensors))
    _, shape, data = layer.tensors[role]
    dtype = rng.choice(list(DTYPES))
    nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
    layer.tensors[role] = dtype, shape, (data * 8)[:nbytes].ljust(nbytes, b"\1")


def _odd_values(rng: random.Random, layer: Layer) -> None:
    role = rng.choice(list(layer.tensors))
    dtype, shape, data = layer.tensors[role]
    odd = rng.choice((b"\xff", b"\x7f", b"\x80", b"\0", struct.pack("<f", math.nan), struct.pack("<f", -math.inf)))
    layer.tensors[role] = dtype, shape, (odd * len(data))[: len(data)]


def _missing_tensor(rng: random.Random, layer: Layer) -> None:
    del layer.tensors[rng.choice(list(layer.tensors))]


def _renamed_tensor(rng: random.Random, layer: Layer) -> None:
    layer.tensors[rng.choice(SUFFIXES)] = layer.tensors.pop(rng.choice(list(layer.tensors)))


def _added_tensor(rng: random.Random, layer: Layer) -> None:
    layer.tensors[rng.choice(SUFFIXES)] = _tensor(
        rng, rng.choice(("F32", "U8", "F8_E4M3")), *rng.choice(((), (6,), (6, 2)))
    )


MUTATIONS = (
    *(_odd_setting, _odd_setting, _missing_setting, _odd_text, _odd_shape, _odd_shape, _odd_dtype, _odd_values),
    *(_missing_tensor, _renamed_tensor, _added_tensor),
)


def hostile(rng: random.Random) -> bytes:
    """A safetensors file with a sound header."""
    layer = rng.choice(LAYERS)(rng)
    for _ in range(rng.choice((0, 1, 1, 1, 1, 2, 3))):
        if layer.tensors:
            rng.choice(MUTATIONS)(rng, layer)
    return file_of(layer, prefix=rng.choice(("", "a.", "model.diffusion_model.a.")), in_metadata=rng.random() < 0.3)


def file_of(layer: Layer, *, prefix: str, in_metadata: bool) -> bytes:
    text = json.dumps(layer.settings).encode() if layer.text is None else layer.text
    tensors, metadata = dict(layer.tensors), {}
    if layer.json_role == "comfy_quant" and in_metadata:
        name = prefix.removeprefix("model.diffusion_model.").removesuffix(".")
        table = json.dumps({"layers": {name: layer.settings}})
        metadata[METADATA] = text.decode(errors="replace") if layer.text is not None else table
    elif layer.json_role is not None:
        tensors.setdefault(layer.json_role, ("U8", [len(text)], text))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for role, (dtype, shape, content) in tensors.items():
        offsets = [len(data), len(data) + len(content)]
        header[prefix + role] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


# reading


class BytesSource:
    """The tensors of a file, once its header was checked."""

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        self.entries, self.metadata = header.tensors, header.metadata
        content = path.read_bytes()
        self._data = bytearray(content[8 + int.from_bytes(content[:8], "little") :])

    def read(self, name: str) -> torch.Tensor:
        entry = self.entries[name]
        if entry.start == entry.stop:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        data = self._data[entry.start : entry.stop]  # of its own, as numbers have to be aligned
        return torch.frombuffer(data, dtype=DTYPES[entry.dtype]).view(entry.shape)


def read_encodings(path: Path) -> None:
    """Find every encoded weight of a file and decode it whole."""
    source = BytesSource(path)
    encoded = find_encoded(source, source.entries)
    claimed = [name for weight in encoded.values() for name in weight.tensors]
    assert len(claimed) == len(set(claimed))
    assert set(claimed) <= set(source.entries)
    for weight in encoded.values():
        found = read_encoded(source, weight)
        decoded = unpack(found, torch.float32) if isinstance(found, Packed) else found
        assert tuple(decoded.shape) == tuple(found.shape)
        assert decoded.numel() <= 2 * DTYPE_BITS["F64"] * max(1, source.entries[weight.name].stop)


def fuzz(cases: int, seed: int) -> Counter[str]:
    """How often each outcome was met; files with an unexpected one are kept in the current folder."""
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.safetensors"
        for case in range(cases):
            content = hostile(rng)
            path.write_bytes(content)
            result = outcome(path, read_encodings)
            outcomes[result] += 1
            if result not in EXPECTED:
                Path(f"fuzz-encodings-{seed}-{case}.safetensors").write_bytes(content)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    outcomes = fuzz(chosen.cases, chosen.seed)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    wrong = sum(count for result, count in outcomes.items() if result not in EXPECTED)
    seconds = round(time.perf_counter() - started, 1)
    print(
        json.dumps(
            {
                "cases": outcomes.total(),
                "seconds": seconds,
                "peak_growth_kib": grown,
                "outcomes": dict(outcomes.most_common(20)),
            }
        )
    )
    return 1 if wrong or grown > MOST_BYTES / 1024 else 0


if __name__ == "__main__":
    sys.exit(main())
