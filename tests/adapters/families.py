"""Adapters that are not plain LoRA, as their trainers write them, and what they do to a weight, in plain float64 torch.

Typed from LyCORIS', ComfyUI's and PEFT's formulas and not from the parser: `file` gives a module's tensors by ending,
`delta` the change of the module's weight from those tensors and the base.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def normal(generator, *shape, size=0.1):
    return torch.randn(*shape, generator=generator) * size


def wide(tensors, *endings):
    return [tensors[ending].double() for ending in endings]


def divisor(size, factor):
    """LyCORIS' first factor of a side: `factor` itself where it divides, else the largest smaller divisor."""
    return next(part for part in range(min(factor, size), 0, -1) if size % part == 0)


def core(first, middle, last):
    """The product with a core, as LyCORIS rebuilds it."""
    return torch.einsum("ij,jr,ip->pr", middle.flatten(1), last, first).contiguous()


@dataclass(frozen=True)
class LoRA:
    """`.lora_down/.lora_up` or PEFT's, at alpha / rank."""

    down: str = ".lora_down.weight"
    up: str = ".lora_up.weight"
    rank: int = 3
    alpha: float | None = 1.5

    def file(self, shape, generator):
        factors = {self.down: normal(generator, self.rank, shape[1]), self.up: normal(generator, shape[0], self.rank)}
        return factors if self.alpha is None else {**factors, ".alpha": torch.tensor(self.alpha)}

    def delta(self, tensors, base):
        up, down = wide(tensors, self.up, self.down)
        return up @ down * (1.0 if self.alpha is None else self.alpha / self.rank)


@dataclass(frozen=True)
class LoKr:
    """`left` and `right` whole, or factored; alpha counts only where one is factored."""

    factor: int = 4
    left_factored: bool = False
    right_factored: bool = True
    with_core: bool = False
    rank: int = 2
    alpha: float | None = 1.0

    def file(self, shape, generator):
        rows, columns = (divisor(size, self.factor) for size in shape)
        parts = {"w1": (rows, columns, self.left_factored)}
        parts["w2"] = (shape[0] // rows, shape[1] // columns, self.right_factored)
        tensors = {}
        for name, (height, width, factored) in parts.items():
            if not factored:
                tensors[f".lokr_{name}"] = normal(generator, height, width)
                continue
            tall = normal(generator, height, self.rank)
            has_core = self.with_core and name == "w2"
            tensors[f".lokr_{name}_a"] = tall.T.contiguous() if has_core else tall
            tensors[f".lokr_{name}_b"] = normal(generator, self.rank, width)
            if has_core:
                tensors[".lokr_t2"] = normal(generator, self.rank, self.rank, 1, 1, size=0.5)
        return tensors if self.alpha is None else {**tensors, ".alpha": torch.tensor(self.alpha)}

    def delta(self, tensors, base):
        left = tensors[".lokr_w1"].double() if not self.left_factored else self._pair(tensors, "w1")
        right = tensors[".lokr_w2"].double() if not self.right_factored else self._pair(tensors, "w2")
        scaled = self.alpha is not None and (self.left_factored or self.right_factored)
        return torch.kron(left, right) * (self.alpha / self.rank if scaled else 1.0)

    def _pair(self, tensors, name):
        first, last = wide(tensors, f".lokr_{name}_a", f".lokr_{name}_b")
        return core(first, *wide(tensors, ".lokr_t2"), last) if self.with_core and name == "w2" else first @ last


@dataclass(frozen=True)
class LoHa:
    """Two pairs, with cores between them or not."""

    rank: int = 3
    with_core: bool = False
    alpha: float | None = 1.5

    def file(self, shape, generator):
        tensors = {}
        for name in ("1", "2"):
            tall = normal(generator, shape[0], self.rank, size=0.2)
            tensors[f".hada_w{name}_a"] = tall.T.contiguous() if self.with_core else tall
            tensors[f".hada_w{name}_b"] = normal(generator, self.rank, shape[1], size=0.2)
            if self.with_core:
                tensors[f".hada_t{name}"] = normal(generator, self.rank, self.rank, size=0.5)
        return tensors if self.alpha is None else {**tensors, ".alpha": torch.tensor(self.alpha)}

    def delta(self, tensors, base):
        sides = []
        for name in ("1", "2"):
            first, last = wide(tensors, f".hada_w{name}_a", f".hada_w{name}_b")
            sides.append(core(first, *wide(tensors, f".hada_t{name}"), last) if self.with_core else first @ last)
        return sides[0] * sides[1] * (1.0 if self.alpha is None else self.alpha / self.rank)


@dataclass(frozen=True)
class Full:
    """`.diff`."""

    def file(self, shape, generator):
        return {".diff": normal(generator, *shape, size=0.02)}

    def delta(self, tensors, base):
        return tensors[".diff"].double()


@dataclass(frozen=True)
class DoRA:
    """A magnitude over another family: (out, 1), (1, in) or (out,)."""

    inner: object = LoRA()
    ending: str = ".dora_scale"
    axis: str = "rows"

    def file(self, shape, generator):
        size = {"rows": (shape[0], 1), "columns": (1, shape[1]), "vector": (shape[0],)}[self.axis]
        return {**self.inner.file(shape, generator), self.ending: 1 + torch.rand(size, generator=generator)}

    def delta(self, tensors, base):
        whole = base.double() + self.inner.delta(tensors, base)
        magnitude = tensors[self.ending].double()
        magnitude = magnitude[:, None] if self.axis == "vector" else magnitude
        norm = (whole**2).sum(0 if self.axis == "columns" else 1, keepdim=True) ** 0.5
        return magnitude * whole / norm - base.double()


PEFT = LoRA(".lora_A.weight", ".lora_B.weight", alpha=None)

FAMILIES = {
    "LoKr, whole": LoKr(left_factored=False, right_factored=False, alpha=7.0),
    "LoKr, second factored": LoKr(),
    "LoKr, both factored": LoKr(left_factored=True),
    "LoKr, first factored": LoKr(left_factored=True, right_factored=False),
    "LoKr, core": LoKr(with_core=True),
    "LoKr, rank too large for the decode pass": LoKr(factor=16, rank=6, alpha=None),
    "LoHa": LoHa(),
    "LoHa, core": LoHa(with_core=True),
    "LoHa, rank too large for the decode pass": LoHa(rank=9, alpha=None),
    "difference": Full(),
    "DoRA of rows": DoRA(),
    "DoRA of columns": DoRA(axis="columns"),
    "DoRA of PEFT": DoRA(PEFT, ".lora_magnitude_vector", "vector"),
    "DoRA of PEFT, in memory": DoRA(PEFT, ".lora_magnitude_vector.default.weight", "vector"),
    "DoRA, magnitude": DoRA(PEFT, ".magnitude", "vector"),
    "DoRA over LoKr": DoRA(LoKr()),
    "DoRA over LoHa, of columns": DoRA(LoHa(), axis="columns"),
}
