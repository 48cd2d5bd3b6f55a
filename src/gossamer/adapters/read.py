"""Read an adapter file in any known spelling. Loading is total: every key is used, or an error names it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from gossamer.adapters.adapter import Adapter, LowRankTerm, wrong_size
from gossamer.adapters.families import explain_unused, not_an_adapter, only_without_effect
from gossamer.adapters.fused import split_term
from gossamer.adapters.peft_settings import PeftSettings, read_peft_settings, with_folder_settings
from gossamer.adapters.spelling import Recognised, Roles, recognise
from gossamer.adapters.spelling_tables import ENDINGS, Role
from gossamer.checkpoints.flux_names import Part
from gossamer.checkpoints.safetensors_file import read_header, read_tensors, sha256_file
from gossamer.errors import AdapterError, FileDamagedError, GossamerError
from gossamer.models.flux_spec import FluxSpec


def read_adapter(path: Path | str, spec: FluxSpec) -> Adapter:
    """The adapter in a safetensors file, for a model of the sizes in `spec`."""
    header = read_header(path)
    keys = list(header.tensors)
    if not keys:
        raise AdapterError(
            f"{str(path)!r} holds no tensors.",
            "An adapter file has at least one pair of low-rank factors.",
            "Check that this is the right file.",
        )
    found = recognise(keys, spec)
    if found.left_over:
        foreign = not_an_adapter(str(path), keys)
        if foreign is not None:
            raise foreign
        raise explain_unused(str(path), keys, found, header.metadata, spec)
    if not (found.modules or found.text or found.norms):
        raise only_without_effect(str(path), found)
    metadata = with_folder_settings(Path(path), header.metadata)
    tensors = read_tensors(path)
    try:
        _check_values({key: tensor for key, tensor in tensors.items() if key not in found.without_effect})
        return Adapter(
            spec=spec,
            terms=_terms(found, tensors, spec, read_peft_settings(metadata)),
            replacements={norm: tensors[key] for norm, key in found.norms.items()},
            spelling=found.spelling.name,
            metadata={name: text for name, text in header.metadata.items() if name != "format"},
            sha256=sha256_file(path),
            text=_text_terms(found, tensors, metadata),
            unused=found.without_effect,
        )
    except GossamerError as error:
        raise type(error)(f"{str(path)!r}: {error.what}", error.why, error.next_step) from error


def _check_values(tensors: Mapping[str, torch.Tensor]) -> None:
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise FileDamagedError(
                f"The tensor {key!r} holds {tensor.dtype} values.",
                "Factors, biases and alphas of an adapter are floating-point numbers.",
                "Download the file again, or save the adapter again.",
            )
        if not tensor.float().isfinite().all():
            raise FileDamagedError(
                f"The tensor {key!r} holds values that are not finite.",
                "One such value would turn whole pictures black. The file is damaged, or its training diverged.",
                "Download the file again, or use an earlier state of the training.",
            )


def _terms(
    found: Recognised, tensors: Mapping[str, torch.Tensor], spec: FluxSpec, settings: PeftSettings
) -> dict[str, LowRankTerm]:
    terms: dict[str, LowRankTerm] = {}
    for parts, roles in found.modules.items():
        term = _term(roles, tensors, parts[0].name, settings)
        _check_height(_name_in_file(roles), term, parts, spec)
        terms |= split_term(term, parts)
    return terms


def _text_terms(
    found: Recognised, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> dict[str, dict[str, LowRankTerm]]:
    """Terms by text encoder, then by linear."""
    terms = {}
    for component, linears in found.text.items():
        settings = read_peft_settings(metadata, component)
        terms[component] = {name: _term(roles, tensors, name, settings) for name, roles in linears.items()}
    return terms


def _name_in_file(roles: Roles) -> str:
    """What the file calls the module that these are the keys of."""
    key = next(iter(roles.values()))
    return next(key.removesuffix(ending) for ending in ENDINGS if key.endswith(ending))


def _term(roles: Roles, tensors: Mapping[str, torch.Tensor], linear: str, settings: PeftSettings) -> LowRankTerm:
    """One module's term; `linear` is what PEFT's settings know the module by."""
    module = _name_in_file(roles)
    values: dict[Role, torch.Tensor] = {role: tensors[key] for role, key in roles.items()}
    missing = [role for role in ("down", "up") if role not in values]
    if missing:
        raise AdapterError(
            f"The adapter has {' and '.join(values)} for {module!r}, but no {' or '.join(missing)}.",
            "A low-rank term needs both factors.",
            "The file is incomplete; download it again, or save the adapter again.",
        )
    down, up = values["down"], values["up"]
    rank = down.shape[0] if down.dim() else 0
    if rank == 0:
        raise AdapterError(
            f"The adapter's term for {module!r} has no rank.",
            f"Its down factor has the shape {tuple(down.shape)}.",
            "The file is damaged; download it again, or save the adapter again.",
        )
    multiplier = _alpha(module, values["alpha"]) / rank if "alpha" in values else settings.multiplier(linear, rank)
    try:
        return LowRankTerm(down, up, multiplier, values.get("bias"))
    except AdapterError as error:
        raise AdapterError(f"{module!r}: {error.what}", error.why, error.next_step) from error


def _alpha(module: str, alpha: torch.Tensor) -> float:
    if alpha.numel() != 1:
        raise AdapterError(
            f"The alpha of {module!r} has {alpha.numel()} values.",
            "alpha is one number: the strength of a term times its rank.",
            "The file is damaged; download it again, or save the adapter again.",
        )
    return float(alpha)


def _check_height(module: str, term: LowRankTerm, parts: tuple[Part, ...], spec: FluxSpec) -> None:
    """A fused module has exactly the rows of its parts; other modules are checked by the adapter itself."""
    rows = [stop for part in parts for _, stop in part.rows]
    if rows and term.shape[0] != max(rows):
        raise wrong_size(spec, module, term.shape, (max(rows), spec.width))
