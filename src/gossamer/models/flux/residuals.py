"""Which ControlNet residual belongs to which block.

A ControlNet has fewer blocks than the model. Its residuals are spread over the model's blocks in runs of equal length,
or, as XLabs' ControlNets want it, repeated in turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def spread(samples: Sequence[torch.Tensor] | None, blocks: int) -> list[torch.Tensor | None]:
    """The residual of each block, every residual serving a run of blocks; None for all where there are no samples."""
    if not samples:
        return [None] * blocks
    run = -(-blocks // len(samples))
    return [samples[index // run] for index in range(blocks)]


def repeat(samples: Sequence[torch.Tensor] | None, blocks: int) -> list[torch.Tensor | None]:
    """The residual of each block, the residuals taken in turn again and again."""
    return [samples[index % len(samples)] if samples else None for index in range(blocks)]
