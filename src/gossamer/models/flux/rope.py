"""Rotary position embedding: cosines and sines of every token from its ids.

Each token has one id per axis (FLUX.1: picture index, row, column; text has zeros). The channels of a head are shared
out among the axes, and neighbouring channels 2 i and 2 i + 1 of an axis of d channels turn together by

    angle = id / 10000^(2 i / d)        float64, where the device has it; cos and sin are rounded to float32
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gossamer.errors import InvalidOptionError
from gossamer.kernels.pointwise import Rotation

THETA = 10000.0
WITHOUT_FLOAT64 = ("mps", "npu")


def rotation(text_ids: torch.Tensor, image_ids: torch.Tensor, axes: Sequence[int]) -> Rotation:
    """cos and sin (tokens, head size / 2) of text tokens, then image tokens; `axes` are channels of a head by axis.

    Ids are (tokens, axes). A batch dimension in front is accepted: all pictures of a batch have the same positions.
    """
    ids = torch.cat((_without_batch(text_ids), _without_batch(image_ids))).float()
    if ids.shape[-1] != len(axes):
        raise InvalidOptionError(
            f"The position ids have {ids.shape[-1]} axes.",
            f"The model's axes_dims_rope {tuple(axes)} says {len(axes)}.",
            f"Give ids of shape (tokens, {len(axes)}).",
        )
    angles = torch.cat([_angles(ids[:, axis], channels) for axis, channels in enumerate(axes)], dim=-1)
    return Rotation(angles.cos().float(), angles.sin().float())


def _without_batch(ids: torch.Tensor) -> torch.Tensor:
    return ids[0] if ids.dim() == 3 else ids


def _angles(positions: torch.Tensor, channels: int) -> torch.Tensor:
    """(tokens, channels / 2)"""
    dtype = torch.float32 if positions.device.type in WITHOUT_FLOAT64 else torch.float64
    exponents = torch.arange(0, channels, 2, dtype=dtype, device=positions.device) / channels
    return torch.outer(positions.to(dtype), 1.0 / THETA**exponents)
