"""Pictures by the hundred: diffusers' own FLUX pipelines over given components, many prompts at a time.

Each picture has a CPU generator of its own seed, so it starts from the noise that `Pipeline` starts from with that
seed, whatever the batch size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gossamer.errors import InvalidOptionError
from gossamer.pipeline.components import pipeline_kinds


@dataclass(frozen=True)
class BatchSettings:
    """What all pictures of a run share; `batch` pictures are painted at a time."""

    batch: int
    steps: int = 20
    guidance: float = 3.5
    side: int = 256
    max_sequence_length: int = 64


def paint_batches(
    parts: Mapping[str, Any],
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: BatchSettings,
    control: torch.Tensor | None = None,
) -> torch.Tensor:
    """Pictures (B, 3, side, side) in [0, 1], float32, before rounding to 8 bits.

    `parts` are the components by their diffusers names; `control` holds maps (B, 3, side, side) in [0, 1] for a
    transformer that reads them.
    """
    kinds = pipeline_kinds()
    pipeline = (kinds.text if control is None else kinds.control)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for start in range(0, len(prompts), settings.batch):
        chosen = slice(start, start + settings.batch)
        # diffusers takes a control tensor as it is, so it has to be in the autoencoder's range of -1 to 1
        extra = {} if control is None else {"control_image": 2.0 * control[chosen] - 1.0}
        pictures.append(_paint(pipeline, prompts[chosen], seeds[chosen], settings, extra))
    return torch.cat(pictures)


def _paint(
    pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], settings: BatchSettings, extra: Mapping[str, Any]
) -> torch.Tensor:
    images: torch.Tensor = pipeline(
        prompt=list(prompts),
        width=settings.side,
        height=settings.side,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        max_sequence_length=settings.max_sequence_length,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type="pt",
        **extra,
    ).images
    spoilt = [seed for seed, image in zip(seeds, images, strict=True) if not bool(image.isfinite().all())]
    if spoilt:
        raise InvalidOptionError(
            f"{len(spoilt)} pictures hold values that are not finite, the first with seed {spoilt[0]}.",
            "The model's weights, its storage format or its adapter overflow in this computation.",
            "Measure the same model in fp32 storage without adapters to see which of them it is.",
        )
    return images.float()
