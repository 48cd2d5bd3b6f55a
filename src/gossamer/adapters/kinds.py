"""The tensors of one module, by role, into the term that they say; which roles make up which family.

    LoRA    down, up, and lora_B's bias         multiplier alpha / rank
    LoKr    w1, w2, each whole or as _a @ _b    alpha / rank of the factored one; 1 where both are whole
    LoHa    w1_a @ w1_b and w2_a @ w2_b         alpha / rank
    diff    the change itself                   1, whatever alpha says

and with any of them `.diff_b`, a change of the bias that no multiplier scales; with the first three a magnitude, which
makes it DoRA. A core t1 or t2 (rank, rank) stands between the factors, of which the first is transposed then:
w2_a.T @ t2 @ w2_b. Formulas: ComfyUI's weight adapters and LyCORIS, which wrote most such files; PEFT's settings, where
a file has them, give LoKr a rank when both factors are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from gossamer.adapters.peft_settings import PeftSettings
from gossamer.adapters.spelling_tables import Role
from gossamer.adapters.terms import (
    BiasTerm,
    DecomposedTerm,
    DifferenceTerm,
    HadamardTerm,
    KroneckerTerm,
    LinearTerm,
    LowRankTerm,
    Matrix,
    folded,
    rank_of,
)
from gossamer.errors import AdapterError

Shapes = Mapping[Role, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class ModuleTensors:
    """What a file has for one module: its name there, the linear's own name, the tensors by role, PEFT's settings."""

    module: str
    linear: str
    values: Mapping[Role, torch.Tensor]
    settings: PeftSettings

    def need(self, *roles: Role) -> list[torch.Tensor]:
        """The tensors of these roles, all of which have to be there."""
        missing = [role for role in roles if role not in self.values]
        if missing:
            raise AdapterError(
                f"The adapter has {' and '.join(self.values)} for {self.module!r}, but no {' or '.join(missing)}.",
                "A term needs all of its factors.",
                "The file is incomplete; download it again, or save the adapter again.",
            )
        return [self.values[role] for role in roles]

    def multiplier(self, rank: int | None) -> float:
        """alpha / rank; 1 where the file gives no alpha, or a term has no rank that it could be divided by."""
        if "alpha" in self.values:
            return 1.0 if rank is None else self._alpha() / rank
        return self.settings.multiplier(self.linear, rank)

    def _alpha(self) -> float:
        alpha = self.values["alpha"]
        if alpha.numel() != 1:
            raise AdapterError(
                f"The alpha of {self.module!r} has {alpha.numel()} values.",
                "alpha is one number: the strength of a term times its rank.",
                "The file is damaged; download it again, or save the adapter again.",
            )
        return float(alpha)


@dataclass(frozen=True)
class Kind:
    """A family: its name, the roles that only it has, how its term is made, and (out, rank) from shapes alone."""

    name: str
    roles: frozenset[Role]
    make: Callable[[ModuleTensors], LinearTerm]
    size: Callable[[Shapes], tuple[int, int | None]]


def build_term(of: ModuleTensors) -> LinearTerm:
    """The term that a module's tensors say."""
    kinds = kinds_of(of.values)
    if len(kinds) > 1:
        raise AdapterError(
            f"The adapter changes {of.module!r} in {len(kinds)} ways at once.",
            f"It has {' and '.join(of.values)}: {' and '.join(kind.name for kind in kinds)}.",
            "The file is put together from several; save it again from one.",
        )
    try:
        return _with_bias(of, _with_magnitude(of, kinds[0].make(of))) if kinds else _bias_alone(of)
    except AdapterError as error:
        if of.module in error.what:
            raise
        raise AdapterError(f"{of.module!r}: {error.what}", error.why, error.next_step) from error


def kinds_of(roles: Mapping[Role, object]) -> list[Kind]:
    """The families that any of these roles belongs to."""
    return [kind for kind in KINDS if kind.roles & roles.keys()]


def size_of(shapes: Shapes) -> tuple[int, int | None] | None:
    """(out, rank) of a module by the shapes in a file's header; None where they do not say."""
    kinds = kinds_of(shapes)
    try:
        return kinds[0].size(shapes) if len(kinds) == 1 else None
    except (KeyError, IndexError):  # a factor is missing, or is no matrix
        return None


# families -------------------------------------------------------------------------------------------------------------


def _low_rank(of: ModuleTensors) -> LowRankTerm:
    down, up = of.need("down", "up")
    term = LowRankTerm(down, up, 1.0, of.values.get("bias"))
    return replace(term, multiplier=of.multiplier(_some_rank(of, term)))


def _kronecker(of: ModuleTensors) -> KroneckerTerm:
    term = KroneckerTerm(_factor(of, "lokr_w1"), _factor(of, "lokr_w2", "lokr_t2"))
    factored = term.left.rank is not None or term.right.rank is not None
    return replace(term, multiplier=of.multiplier(_some_rank(of, term) if factored else None))


def _hadamard(of: ModuleTensors) -> HadamardTerm:
    first, second = _product(of, "hada_w1", "hada_t1"), _product(of, "hada_w2", "hada_t2")
    term = HadamardTerm(*first, *second)
    return replace(term, multiplier=of.multiplier(_some_rank(of, term)))


def _difference(of: ModuleTensors) -> DifferenceTerm:
    (matrix,) = of.need("diff")
    return DifferenceTerm(matrix)


def _bias_alone(of: ModuleTensors) -> BiasTerm:
    """A module with no factor at all: a magnitude by itself means nothing."""
    extra = [role for role in of.values if role not in ("diff_b", "alpha")]
    if extra:
        raise AdapterError(
            f"The adapter has {' and '.join(extra)} for {of.module!r}, but no factors.",
            "A magnitude scales the sum of the weight and a term, and there is no term.",
            "The file is incomplete; download it again, or save the adapter again.",
        )
    (bias,) = of.need("diff_b")
    return BiasTerm(bias)


def _factor(of: ModuleTensors, name: Role, core: Role | None = None) -> Matrix:
    """A factor of LoKr: whole, or as a product."""
    if name in of.values:
        return Matrix(of.values[name])
    return Matrix(*_product(of, name, core))


def _product(of: ModuleTensors, name: str, core: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(up, down) of `name`_a and `name`_b, with the core between them where there is one."""
    up, down = of.need(f"{name}_a", f"{name}_b")  # type: ignore[arg-type]
    if core is None or core not in of.values:
        return up, down
    middle = of.values[core]  # type: ignore[index]
    if up.dim() != 2 or down.dim() != 2 or middle.numel() != up.shape[0] * down.shape[0]:
        shapes = [tuple(tensor.shape) for tensor in (up, middle, down)]
        raise AdapterError(
            f"The core {core} of {of.module!r} does not fit between its factors.",
            f"{name}_a, {core} and {name}_b are {shapes}; a linear needs (rank, out), (rank, rank) and (rank, in).",
            "The file is damaged, or the module is a convolution; check that it was made for FLUX.1.",
        )
    return up.T.contiguous(), middle.float().reshape(up.shape[0], down.shape[0]) @ down.float()


def _some_rank(of: ModuleTensors, term: LinearTerm) -> int:
    rank = rank_of(term)
    if not rank:
        shapes = ", ".join(f"{role} {tuple(value.shape)}" for role, value in of.values.items())
        raise AdapterError(
            f"The adapter's term for {of.module!r} has no rank.",
            f"Its factors have the shapes {shapes}.",
            "The file is damaged; download it again, or save the adapter again.",
        )
    return rank


# what comes beside the factors ----------------------------------------------------------------------------------------


def _with_magnitude(of: ModuleTensors, term: LinearTerm) -> LinearTerm:
    if "magnitude" not in of.values:
        if of.settings.use_dora and isinstance(term, LowRankTerm):
            raise AdapterError(
                f"This adapter was trained with DoRA, and has no magnitude for {of.module!r}.",
                "Its settings say use_dora: without the magnitudes the factors mean something else.",
                "The file is incomplete; download it again, or save the adapter again.",
            )
        return term
    magnitude = of.values["magnitude"]
    magnitude = magnitude[:, None] if magnitude.dim() == 1 else magnitude
    bias = None if term.bias is None else term.bias.float() * term.multiplier
    return DecomposedTerm(replace(term, bias=None), magnitude, bias)  # type: ignore[type-var]


def _with_bias(of: ModuleTensors, term: LinearTerm) -> LinearTerm:
    """`.diff_b` is not scaled by alpha / rank, so that goes into the factors where it is not 1."""
    if "diff_b" not in of.values:
        return term
    bias, term = of.values["diff_b"], folded(term)
    if term.bias is not None:
        bias = bias.float() + term.bias.float()
    return replace(term, bias=bias)  # type: ignore[type-var]


# sizes by shapes ------------------------------------------------------------------------------------------------------


def _kronecker_size(shapes: Shapes) -> tuple[int, int | None]:
    height, rank = 1, None
    wholes: tuple[tuple[Role, str | None], ...] = (("lokr_w1", None), ("lokr_w2", "lokr_t2"))
    for name, core in wholes:
        if name in shapes:
            height *= shapes[name][0]
        else:
            height *= _product_height(shapes, name, core)
            rank = shapes[f"{name}_b"][0]  # type: ignore[index]
    return height, rank


def _product_height(shapes: Shapes, name: str, core: str | None) -> int:
    up = shapes[f"{name}_a"]  # type: ignore[index]
    return up[1] if core in shapes else up[0]


def _hadamard_size(shapes: Shapes) -> tuple[int, int | None]:
    return _product_height(shapes, "hada_w1", "hada_t1"), shapes["hada_w1_b"][0]


KINDS: tuple[Kind, ...] = (
    Kind("LoRA", frozenset({"down", "up", "bias"}), _low_rank, lambda of: (of["up"][0], of["down"][0])),
    Kind(
        "LoKr",
        frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}),
        _kronecker,
        _kronecker_size,
    ),
    Kind(
        "LoHa",
        frozenset({"hada_w1_a", "hada_w1_b", "hada_t1", "hada_w2_a", "hada_w2_b", "hada_t2"}),
        _hadamard,
        _hadamard_size,
    ),
    Kind("difference", frozenset({"diff"}), _difference, lambda of: (of["diff"][0], None)),
)
