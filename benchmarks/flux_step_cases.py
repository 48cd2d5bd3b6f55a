"""The cases of `flux_step`: which models are measured, and how each is built, adapted and put back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import flux_step_peers as peers
from gossamer.adapters import Adapter, attach, attached, detach
from gossamer.bench.random_flux import ADAPTERS, Workload, fill
from gossamer.models.flux import FluxTransformer, prepare
from gossamer.models.swap import quantize
from gossamer.pipeline.components import StorageChoice, storage_plan

OURS = "gossamer"


@dataclass(frozen=True)
class Case:
    """One model. Its rows differ by the adapters that are attached.

    `copies` says whether weights that are multiplied as stored may get merged copies while adapters are attached.
    """

    system: str
    storage: str
    compute: str
    build: Callable[[Workload], Any]
    compiled: bool = False
    copies: bool = True

    @property
    def name(self) -> str:
        """For example gossamer/nf4/bf16, torchao+compile/fp8/fp8 or gossamer-copies/fp8/fp8."""
        return f"{spelled(self.system, self.compiled, self.copies)}/{self.storage}/{self.compute}"

    def row_name(self, kind: str) -> str:
        """The name of the row with adapters of a kind."""
        return f"{self.name}/{kind}"


def spelled(system: str, compiled: bool, copies: bool) -> str:
    """A system, and what it does that is not its usual way."""
    return f"{system}{'+compile' * compiled}{'-copies' * (not copies)}"


# ours -----------------------------------------------------------------------------------------------------------------

STORAGES = ("bf16", "fp8", "int8", "nf4", "Q8_0", "Q4_K", "Q6_K")
COMPUTES = {storage: ("bf16",) if storage == "bf16" else ("fp8", "bf16") for storage in STORAGES}


def build_ours(work: Workload, storage: str, compute: str, copies: bool = True) -> Any:
    """Our transformer with every linear inside the blocks in a storage format, the rest in bf16."""
    with torch.device("meta"):
        model = FluxTransformer.from_config(work.config)
    fill(model, work)
    quantize(model, storage_plan(StorageChoice(storage, "bf16", ()), "bf16"))
    prepare(model, compute, keeps_merged=copies)
    return model.eval()


def attach_ours(model: Any, adapters: Sequence[Adapter]) -> None:
    """Attach all of them under numbered names."""
    for place, adapter in enumerate(adapters):
        attach(model, adapter, f"adapter_{place}")


def detach_ours(model: Any) -> None:
    """Take every adapter off."""
    for name in attached(model):
        detach(model, name)


# all ------------------------------------------------------------------------------------------------------------------

CASES: tuple[Case, ...] = (
    *(
        Case(OURS, storage, compute, partial(build_ours, storage=storage, compute=compute))
        for storage in STORAGES
        for compute in COMPUTES[storage]
    ),
    *(
        Case(OURS, same, same, partial(build_ours, storage=same, compute=same, copies=False), copies=False)
        for same in ("bf16", "fp8")
    ),
    Case("diffusers", "bf16", "bf16", peers.plain),
    Case("diffusers", "bf16", "bf16", peers.plain, compiled=True),
    Case("torchao", "fp8", "fp8", peers.torchao_fp8),
    Case("torchao", "fp8", "fp8", peers.torchao_fp8, compiled=True),
    Case("bitsandbytes", "int8", "int8", peers.bitsandbytes_int8),
    Case("bitsandbytes", "nf4", "bf16", peers.bitsandbytes_nf4),
    *(Case("gguf", kind, "bf16", partial(peers.gguf, storage=kind)) for kind in ("Q8_0", "Q4_K", "Q6_K")),
    Case("quanto", "int8", "bf16", partial(peers.quanto, weights_dtype="int8")),
    Case("quanto", "fp8", "bf16", partial(peers.quanto, weights_dtype="float8")),
)


def row_names() -> list[str]:
    """Every row, adapters innermost."""
    return [case.row_name(kind) for case in CASES for kind in ADAPTERS]


def attach_all(case: Case, model: Any, adapters: Sequence[Adapter]) -> None:
    """Attach adapters the way of the case's system, and compile afterwards where the case says so."""
    (attach_ours if case.system == OURS else peers.attach)(model, adapters)
    if case.compiled:
        torch.compiler.reset()
        model.compile_repeated_blocks()


def detach_all(case: Case, model: Any) -> None:
    """Back to the bare model."""
    (detach_ours if case.system == OURS else peers.detach)(model)
