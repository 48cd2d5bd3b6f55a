"""Pictures of random scenes and what the scene reader should find in them."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from drawing import compiler, to_bytes
from gossamer.demo.camera import frame_of, project
from gossamer.demo.reader_net import GRID, PICTURE
from gossamer.demo.render import pack_scenes, render
from gossamer.demo.scene import COLOURS, MATERIALS, RADIUS, SHAPES, Scene, Solid, sample_split

MOST = 3  # objects a scene
BLOCK = 250  # scenes sampled from one seed
Render = Callable[[Sequence[Scene]], Tensor]


@dataclass(frozen=True)
class Targets:
    """What N pictures show, three places each: `cell` (N, 3, 2) is the centre's row and column on the reader's grid,
    `place` (N, 3, 3) is x, z, base; the others are (N, 3) indices, and `present` is False where there is no object.
    """

    present: Tensor
    shape: Tensor
    colour: Tensor
    size: Tensor
    material: Tensor
    cell: Tensor
    place: Tensor

    def __getitem__(self, index: Tensor) -> Targets:
        return Targets(*(getattr(self, field.name)[index] for field in fields(self)))


def sample_scenes(count: int, held: bool, seed: int, processes: int | None = None) -> list[Scene]:
    """`count` seeded scenes from one side of the split, the same for any number of processes."""
    blocks = [(f"reader {seed} {held} {block}", held) for block in range(math.ceil(count / BLOCK))]
    # forked before CUDA starts; a spawned child would import torch anew
    with multiprocessing.get_context("fork").Pool(processes or os.cpu_count()) as pool:
        return [scene for scenes in pool.starmap(_sample_block, blocks) for scene in scenes][:count]


def _sample_block(seed: str, held: bool) -> list[Scene]:
    rng = random.Random(seed)
    return [sample_split(rng, held=held) for _ in range(BLOCK)]


def targets_of(scenes: Sequence[Scene], device: torch.device) -> Targets:
    """The targets of N scenes."""
    rows = [[_numbers(solid) for solid in scene.solids] for scene in scenes]
    nothing = [0.0] * len(_numbers(scenes[0].solids[0]))
    filled = [row + [nothing] * (MOST - len(row)) for row in rows]
    numbers = torch.tensor(filled, device=device)  # (N, 3, 10)
    present, shape, colour, size, material = numbers[..., :5].long().unbind(-1)
    return Targets(present.bool(), shape, colour, size, material, numbers[..., 5:7], numbers[..., 7:])


def _numbers(solid: Solid) -> list[float]:
    """1 for present, four indices, row and column of the centre, x, z, base."""
    looks = (SHAPES, solid.shape), (COLOURS, solid.colour), (tuple(RADIUS), solid.size), (MATERIALS, solid.material)
    centre = project(solid.x, solid.base + solid.height / 2, solid.z, frame_of(GRID))
    return [1.0, *(float(names.index(name)) for names, name in looks), *centre, solid.x, solid.z, solid.base]


def mirrored(pictures: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
    """The same world seen in a mirror: left is right, everything else stays."""
    cell = torch.stack([targets.cell[..., 0], GRID - targets.cell[..., 1]], dim=-1)
    place = targets.place * targets.place.new_tensor([-1.0, 1.0, 1.0])
    swapped = {field.name: getattr(targets, field.name) for field in fields(targets)} | {"cell": cell, "place": place}
    return pictures.flip(-1), Targets(**swapped)


def renderer(device: torch.device, samples: int, compiled: bool) -> Render:
    """A function from scenes to pictures (B, 3, 256, 256) in [0, 1] on `device`."""
    speed_up = compiler(compiled)

    def draw(scenes: Sequence[Scene]) -> Tensor:
        return render(pack_scenes(scenes, device), PICTURE, samples, speed_up, chunk=len(scenes))

    return draw


def render_bytes(scenes: Sequence[Scene], draw: Render, chunk: int, seconds: float) -> Tensor:
    """Pictures (N, 3, 256, 256) as bytes, `chunk` at a time; stops after `seconds`, so N may be fewer than the scenes.

    Every call of `draw` gets `chunk` scenes, so that a compiled renderer compiles for one shape only.
    """
    pictures: list[Tensor] = []
    start = time.monotonic()
    for first in range(0, len(scenes), chunk):
        part = list(scenes[first : first + chunk])
        filled = part + part[-1:] * (chunk - len(part))
        pictures.append(to_bytes(draw(filled)[: len(part)]))
        if first % (16 * chunk) == 0 and pictures[0].is_cuda:
            torch.cuda.synchronize()  # so that the clock sees the work, not its queue
        if time.monotonic() - start > seconds:
            break
    return torch.cat(pictures)
