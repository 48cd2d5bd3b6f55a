"""Code books of the IQ types: what an index stands for, taken from the `gguf` package at run time.

A grid has one row of 4 or 8 magnitudes for every index. Signs come as a byte whose bit i is set where element i is
negative; some types store only 7 bits and let the parity give the eighth.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from gguf import quants


@cache
def grid(type_name: str, device: torch.device) -> torch.Tensor:
    """Grid of a type: float32 (entries, 4 or 8)."""
    source = getattr(quants, type_name)
    source.init_grid()
    # made outside inference mode, a cached table also serves a later call that records gradients
    with torch.inference_mode(False):
        return torch.from_numpy(np.array(source.grid, dtype=np.float32).reshape(source.grid_shape)).to(device)


@cache
def signs(device: torch.device) -> torch.Tensor:
    """Factor 1 or -1 for every bit of every byte: float32 (256, 8)."""
    with torch.inference_mode(False):
        codes = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device)
        return 1.0 - 2.0 * (codes & 1).float()


@cache
def parity_signs(device: torch.device) -> torch.Tensor:
    """The same for a 7-bit index: float32 (128, 8)."""
    with torch.inference_mode(False):
        codes = torch.from_numpy(np.frombuffer(quants.IQ2_XXS.ksigns, dtype=np.uint8).astype(np.int64))
        return signs(device)[codes.to(device)]


@cache
def iq4_values(device: torch.device) -> torch.Tensor:
    """The 16 levels of IQ4_NL and IQ4_XS, ascending: float32 (16,)."""
    with torch.inference_mode(False):
        return torch.tensor(quants.IQ4_NL.kvalues, dtype=torch.float32, device=device)


def rows(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of `table` at integer `index` (...): (..., *row shape)."""
    picked = table.index_select(0, index.reshape(-1).int())
    return picked.view(*index.shape, *table.shape[1:])
