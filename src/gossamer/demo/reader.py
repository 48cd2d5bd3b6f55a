"""The scene reader: looks at a picture and says which objects it shows and where, without knowing the prompt.

Stored beside this file as `reader.safetensors`: the tensors of `ReaderNet` in fp16, under their names there. The recipe
that made it is `training/train_reader.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn import functional

from gossamer.demo.reader_net import PICTURE, STRIDE, Maps, ReaderNet, split_maps
from gossamer.demo.scene import COLOURS, MATERIALS, RADIUS, SHAPES, Relation, Solid, relation_between
from gossamer.errors import FileDamagedError, FileMissingError, InvalidOptionError

WEIGHTS = Path(__file__).with_name("reader.safetensors")
THRESHOLD = 0.4  # least heat of a centre
APART = 10.0  # pixels: two centres nearer than this are one object seen twice
BATCH = 16  # pictures at a time, about 0.2 GB of activations


@dataclass(frozen=True)
class SeenSolid:
    """One object as seen. `x`, `z`, `base` are world units; `confidence` is that of shape and colour, in [0, 1]."""

    shape: str
    colour: str
    x: float
    z: float
    base: float
    confidence: float
    size: str = "medium"
    material: str = "matte"

    @property
    def solid(self) -> Solid:
        """The same object as a scene would hold it."""
        return Solid(self.shape, self.colour, self.material, self.size, self.x, self.z, self.base)


@dataclass(frozen=True)
class Reading:
    """All objects seen in one picture, the surest first."""

    objects: tuple[SeenSolid, ...]

    def relation(self, subject: int, other: int) -> Relation:
        """How object number `subject` stands to object number `other`."""
        return relation_between(self.objects[subject].solid, self.objects[other].solid)


def load_reader(path: Path = WEIGHTS) -> ReaderNet:
    """The trained network, on the CPU in float32, ready to read."""
    if not path.is_file():
        raise FileMissingError(
            "The scene reader's weights are not there.",
            f"{path} does not exist.",
            "Install the package again, or make the file with training/train_reader.py.",
        )
    net = ReaderNet()
    try:
        net.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    except (SafetensorError, RuntimeError) as error:
        raise FileDamagedError(
            "The scene reader's weights cannot be used.",
            f"{path}: {error}",
            "Install the package again, or make the file with training/train_reader.py.",
        ) from error
    return net.eval()


def read_pictures(pictures: torch.Tensor, net: ReaderNet | None = None) -> list[Reading]:
    """What each of (B, 3, H, W) float pictures in [0, 1] shows, with `net` or the stored reader.

    The network runs where it is; pictures of another size than 256x256 are resized first.
    """
    if pictures.dim() != 4 or pictures.shape[1] != 3 or not pictures.is_floating_point():
        raise InvalidOptionError(
            "These are not pictures that the scene reader can look at.",
            f"It takes floats in [0, 1] of shape (batch, 3, h, w), not {pictures.dtype} {tuple(pictures.shape)}.",
            "Convert the pictures first; a single one needs a batch axis.",
        )
    if pictures.shape[2] != pictures.shape[3]:
        raise InvalidOptionError(
            "The scene reader looks at square pictures only.",
            f"These are {pictures.shape[3]} wide and {pictures.shape[2]} high; resizing would bend every shape.",
            "Crop the pictures to squares, or paint square ones.",
        )
    net = load_reader() if net is None else net
    weight = next(net.parameters())
    readings: list[Reading] = []
    with torch.inference_mode():
        for chunk in pictures.split(BATCH):
            readings += decode(net(_fitted(chunk.to(weight.device, weight.dtype))))
    return readings


def _fitted(pictures: torch.Tensor) -> torch.Tensor:
    if pictures.shape[-1] == PICTURE:
        return pictures
    return functional.interpolate(pictures, (PICTURE, PICTURE), mode="bilinear", antialias=True).clamp(0, 1)


def decode(output: torch.Tensor, threshold: float = THRESHOLD) -> list[Reading]:
    """The objects in the network's output (B, 22, rows, columns): one for each peak of at least `threshold`."""
    maps = split_maps(output.cpu())
    heat, shapes = maps.heat.max(dim=1)  # (B, rows, columns): shapes compete for a centre
    peaks = (heat == functional.max_pool2d(heat, 3, stride=1, padding=1)) & (heat.sigmoid() >= threshold)
    return [_reading(maps, heat, shapes, index, peaks[index].nonzero()) for index in range(len(heat))]


def _reading(maps: Maps, heat: torch.Tensor, shapes: torch.Tensor, index: int, cells: torch.Tensor) -> Reading:
    """The objects of picture number `index`, from its peak cells (n, 2) of row and column."""
    order = heat[index, cells[:, 0], cells[:, 1]].argsort(descending=True, stable=True)
    kept: list[tuple[int, int]] = []
    for row, column in cells[order].tolist():
        if all((row - r) ** 2 + (column - c) ** 2 >= (APART / STRIDE) ** 2 for r, c in kept):
            kept.append((row, column))
    seen = [_seen(maps, heat, shapes, (index, row, column)) for row, column in kept]
    return Reading(tuple(sorted(seen, key=lambda solid: -solid.confidence)))


def _seen(maps: Maps, heat: torch.Tensor, shapes: torch.Tensor, cell: tuple[int, int, int]) -> SeenSolid:
    """The object whose centre is in `cell` (picture, row, column)."""
    index, row, column = cell
    colour = maps.colour[index, :, row, column].softmax(dim=0)
    x, z, base = maps.place[index, :, row, column].tolist()
    return SeenSolid(
        shape=SHAPES[int(shapes[cell])],
        colour=COLOURS[int(colour.argmax())],
        x=x,
        z=z,
        base=base,
        confidence=float(heat[cell].sigmoid() * colour.max()),
        size=tuple(RADIUS)[int(maps.size[index, :, row, column].argmax())],
        material=MATERIALS[int(maps.material[index, :, row, column].argmax())],
    )
