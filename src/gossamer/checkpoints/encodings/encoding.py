"""What an encoding offers: to find its weights among tensor names, and to read one of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch

from gossamer.checkpoints.source import TensorSource
from gossamer.formats import Packed


@dataclass(frozen=True)
class Encoding:
    """One way of storing a weight as several tensors.

    `find(source, names)` gives, for each weight among `names` that is stored this way, the names of every tensor that
    belongs to it; it looks at names and at the metadata only. `read(source, weight)` gives the weight in its logical
    shape (out, in): as `Packed` where a storage format holds exactly the same numbers, else decoded to float32.
    """

    name: str
    find: Callable[[TensorSource, Collection[str]], Mapping[str, tuple[str, ...]]]
    read: Callable[[TensorSource, str], Packed | torch.Tensor]


def beside(weight: str, roles: Collection[str], names: Collection[str]) -> tuple[str, ...]:
    """The weight and those of its layer's tensors that are among `names`: `a.b.weight` with role `c` has `a.b.c`."""
    layer = weight.removesuffix("weight")
    return tuple(name for name in (weight, *(layer + role for role in roles)) if name in names)
