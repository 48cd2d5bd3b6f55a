"""Where the weights of a pipeline are while it runs: what a plan says and what the offloading carries out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LAYER_SLOTS = 2  # for layers of text encoders, and linears of the modulation

TextPlacement = Literal["resident", "evicted", "streamed"]
VaePlacement = Literal["whole", "tiled"]
ModulationPlacement = Literal["prepass", "resident"]


@dataclass(frozen=True)
class Placement:
    """Where each part is while a pipeline runs.

    `resident_blocks` of the transformer's blocks stay on the GPU (`spread` says which); the others come into a buffer
    for `slots` of the largest, from page-locked host memory, or from the mapped file where they are not `pinned`. What
    else comes one by one has room for two.

    Text encoders stay (`resident`), or come whole when they run and leave (`evicted`), or come layer by layer
    (`streamed`). In the last two cases they and the transformer take turns, and are never there together. The VAE
    stays, and decodes a picture `whole`, or `tiled` into strips. The modulation is computed in a pre-pass, so that its
    weights are not on the GPU while denoising, or its weights are `resident`.
    """

    resident_blocks: int
    slots: int = 2
    pinned: bool = True
    text: TextPlacement = "resident"
    vae: VaePlacement = "whole"
    modulation: ModulationPlacement = "prepass"


def spread(count: int, resident: int) -> frozenset[int]:
    """Which of `count` blocks stay on the device: as evenly as can be, so that the bus is used steadily."""
    if not 0 <= resident <= count:
        raise ValueError(f"{resident} of {count} blocks cannot be resident")
    return frozenset(index for index in range(count) if (index + 1) * resident // count > index * resident // count)
