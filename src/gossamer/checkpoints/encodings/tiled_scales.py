"""Block scales in the tiled order that tensor cores read, put back into rows and columns.

A matrix of scales (rows, columns) is padded to multiples of 128 and 4 and cut into tiles of 128 x 4, which follow one
another by rows. Within a tile the scale of row 32 j + i and column k stands at byte 16 i + 4 j + k.

Source: "1D block scaling factors layout" in NVIDIA's cuBLAS documentation.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from gossamer.checkpoints.encodings.stored import read_shaped
from gossamer.checkpoints.source import TensorSource


def read_tiles(
    source: TensorSource, weight: str, name: str, dtypes: Collection[str], rows: int, columns: int
) -> torch.Tensor:
    """Bytes (rows, columns), contiguous, of a tensor of padded shape or of one line."""
    shape = tiled_shape(rows, columns)
    stored = read_shaped(source, weight, name, dtypes, (shape, (shape[0] * shape[1],)))
    return untile(stored.view(torch.uint8), rows, columns).contiguous()


def tiled_shape(rows: int, columns: int) -> tuple[int, int]:
    """The padded (rows, columns)."""
    return -(-rows // 128) * 128, -(-columns // 4) * 4


def untile(stored: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Bytes (rows, columns) of stored bytes in tiles."""
    padded_rows, padded_columns = tiled_shape(rows, columns)
    tiles = stored.reshape(padded_rows // 128, padded_columns // 4, 32, 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(padded_rows, padded_columns)[:rows, :columns]
