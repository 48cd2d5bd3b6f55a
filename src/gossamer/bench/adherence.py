"""Does a picture show what its caption asked for: held-out captions as questions, the scene reader as the judge."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from gossamer.demo.captions import Caption, caption
from gossamer.demo.grade import Summary, grade, summarize
from gossamer.demo.reader import read_pictures
from gossamer.demo.reader_net import ReaderNet
from gossamer.demo.scene import sample_split

CAPTION_SEED = 2026
COUNTS = (1, 2, 3)  # objects in a scene


def held_out_captions(number: int, seed: int = CAPTION_SEED) -> list[Caption]:
    """Captions of scenes that training never saw, with one, two and three objects in turn.

    A shorter list is the beginning of a longer one.
    """
    rng = random.Random(seed)
    scenes = (sample_split(rng, held=True, count=COUNTS[index % len(COUNTS)]) for index in range(number))
    return [caption(scene, rng) for scene in scenes]


def adherence(captions: Sequence[Caption], pictures: torch.Tensor, reader: ReaderNet) -> Summary:
    """Shares of objects, relations and whole scenes that (B, 3, H, W) pictures in [0, 1] show, in per cent."""
    readings = read_pictures(pictures, reader)
    return summarize([grade(asked.scene, seen) for asked, seen in zip(captions, readings, strict=True)])
