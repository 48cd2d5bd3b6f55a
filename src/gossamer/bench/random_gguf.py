"""A GGUF file with the names and shapes of a FLUX.1 transformer and random values, written at the speed of the disk.

    linear weights   of the block type that was asked for; a few of plain bf16, as in published files
    biases, scales   float32; scales are about 1

Every tensor repeats one slab of packed values, seeded by its kind, from its beginning: packing 12 B values would take
minutes, and what is measured with such a file does not depend on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from zlib import crc32

import gguf
import numpy as np
import torch

from gossamer.checkpoints.flux_names import bfl_linears, bfl_norms
from gossamer.formats import pack
from gossamer.models.flux_spec import FluxSpec, linear_shapes

SMALL = ("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer")  # published files keep them BF16
PLAIN = {"F32": torch.float32, "BF16": torch.bfloat16}
SLAB_SHAPE = (256, 4096)  # (out, in) of the values that are repeated
CHUNK_BYTES = 64 << 20  # that are written at once
ALIGNMENT = 32  # of tensors in the file

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]  # type and shape by BFL name


def shapes_of(spec: FluxSpec, storage: str) -> Shapes:
    """What the file holds, as published GGUF files choose it."""
    linears, counts = linear_shapes(spec), (spec.num_layers, spec.num_single_layers)
    shapes: dict[str, tuple[str, tuple[int, ...]]]
    shapes = dict.fromkeys(bfl_norms(*counts), ("F32", (spec.attention_head_dim,)))
    for name, parts in bfl_linears(*counts, spec.width, guidance=spec.guidance_embeds).items():
        rows, width = sum(linears[part.name][0] for part in parts), linears[parts[0].name][1]
        kind = "BF16" if name.startswith(SMALL) else storage
        shapes |= {f"{name}.weight": (kind, (rows, width)), f"{name}.bias": ("F32", (rows,))}
    return shapes


def nbytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in a GGUF type."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return prod(shape) // block * size


def write_gguf(path: Path, shapes: Shapes, std: float = 0.02) -> None:
    """The header by the gguf package, then the values, of that standard deviation."""
    start = _write_header(path, shapes)
    kinds = {name: (kind, name.endswith("scale")) for name, (kind, _) in shapes.items()}
    chunks = {kind: _chunk(*kind, std) for kind in set(kinds.values())}
    with path.open("r+b") as file:
        file.seek(start)
        for name, entry in shapes.items():
            size = nbytes(*entry)
            for chunk in _repeated(chunks[kinds[name]], size):
                file.write(chunk)
            file.write(bytes(-size % ALIGNMENT))


def _write_header(path: Path, shapes: Shapes) -> int:
    """Everything before the first tensor; where that begins."""
    writer = gguf.GGUFWriter(path, "flux")
    for name, (kind, shape) in shapes.items():
        number = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[number]
        stored = (*shape[:-1], shape[-1] // block * size) if block > 1 else shape
        dtype = np.dtype(np.uint8 if block > 1 else np.float32)
        writer.add_tensor_info(name, stored, dtype, nbytes(kind, shape), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return -(-path.stat().st_size // ALIGNMENT) * ALIGNMENT


def _repeated(chunk: memoryview, size: int) -> Iterator[memoryview]:
    """The first `size` bytes of a chunk that goes on and on."""
    for start in range(0, size, len(chunk)):
        yield chunk[: size - start]


def _chunk(kind: str, is_scale: bool, std: float) -> memoryview:
    """As many whole slabs as are written at once."""
    generator = torch.Generator().manual_seed(crc32(f"{kind} {is_scale}".encode()))
    values = torch.empty(SLAB_SHAPE).normal_(1.0 if is_scale else 0.0, std, generator=generator)
    if kind in PLAIN:
        stored = values.to(PLAIN[kind])
    else:
        (stored,) = pack(values, kind).tensors.values()
    slab = stored.contiguous().view(torch.uint8).reshape(-1)
    return memoryview(slab.repeat(max(1, CHUNK_BYTES // slab.numel())).numpy())  # type: ignore[arg-type]
