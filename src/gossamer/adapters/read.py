"""Read an adapter file in any known spelling. Loading is total: every key is used, or an error names it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from gossamer.adapters.adapter import Adapter, wrong_size
from gossamer.adapters.families import explain_unused, not_an_adapter, only_without_effect
from gossamer.adapters.fused import split_term
from gossamer.adapters.host_memory import ready_for
from gossamer.adapters.kinds import ModuleTensors, build_term
from gossamer.adapters.peft_settings import read_peft_settings, with_folder_settings
from gossamer.adapters.spelling import Recognised, Roles, recognise
from gossamer.adapters.spelling_tables import ENDINGS, Role
from gossamer.adapters.terms import LinearTerm
from gossamer.checkpoints.flux_names import Part
from gossamer.checkpoints.safetensors_file import read_header, read_tensors, sha256_file
from gossamer.errors import AdapterError, FileDamagedError, GossamerError
from gossamer.models.flux_spec import FluxSpec

Tensors = Mapping[str, torch.Tensor]


def read_adapter(path: Path | str, spec: FluxSpec, device: torch.device | str = "cpu") -> Adapter:
    """The adapter in a safetensors file, for a model of the sizes in `spec`.

    It is in host memory; `device` is that of the model, to which it is then attached sooner (see `host_memory`).
    """
    header = read_header(path)
    keys = list(header.tensors)
    if not keys:
        raise AdapterError(
            f"{str(path)!r} holds no tensors.",
            "An adapter file has at least one change of a layer.",
            "Check that this is the right file.",
        )
    found = recognise(keys, spec)
    if found.left_over:
        foreign = not_an_adapter(str(path), keys)
        if foreign is not None:
            raise foreign
        raise explain_unused(str(path), keys, found, header.metadata, spec)
    if not (found.modules or found.text or found.norms or found.changed_norms):
        raise only_without_effect(str(path), found)
    metadata = with_folder_settings(Path(path), header.metadata)
    tensors = read_tensors(path)
    try:
        _check_values({key: tensor for key, tensor in tensors.items() if key not in found.without_effect})
        adapter = build_adapter(found, tensors, spec, metadata)
    except GossamerError as error:
        raise type(error)(f"{str(path)!r}: {error.what}", error.why, error.next_step) from error
    own_metadata = {name: text for name, text in header.metadata.items() if name != "format"}
    return ready_for(replace(adapter, metadata=own_metadata, sha256=sha256_file(path)), device)


def build_adapter(found: Recognised, tensors: Tensors, spec: FluxSpec, metadata: Mapping[str, str]) -> Adapter:
    """The adapter that the recognised tensors say; `metadata` may hold PEFT's settings."""
    return Adapter(
        spec=spec,
        terms=_terms(found, tensors, spec, metadata),
        replacements={norm: tensors[key] for norm, key in found.norms.items()},
        spelling=found.spelling.name,
        text={component: _text_terms(found, component, tensors, metadata) for component in found.text},
        unused=found.without_effect,
        norm_differences={
            component: {parameter: tensors[key] for parameter, key in changed.items()}
            for component, changed in found.changed_norms.items()
        },
    )


def _check_values(tensors: Tensors) -> None:
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise FileDamagedError(
                f"The tensor {key!r} holds {tensor.dtype} values.",
                "Factors, biases and alphas of an adapter are floating-point numbers.",
                "Download the file again, or save the adapter again.",
            )
        if not _is_finite(tensor):
            raise FileDamagedError(
                f"The tensor {key!r} holds values that are not finite.",
                "One such value would turn whole pictures black. The file is damaged, or its training diverged.",
                "Download the file again, or use an earlier state of the training.",
            )


def _is_finite(tensor: torch.Tensor) -> bool:
    """By the smallest and the largest value, which are NaN where any value is: ten times as fast as `isfinite`."""
    if not tensor.numel():
        return True
    wide = tensor if tensor.dtype.itemsize > 1 else tensor.float()
    return bool(torch.stack(torch.aminmax(wide)).isfinite().all())


def _terms(found: Recognised, tensors: Tensors, spec: FluxSpec, metadata: Mapping[str, str]) -> dict[str, LinearTerm]:
    settings = read_peft_settings(metadata)
    terms: dict[str, LinearTerm] = {}
    for parts, roles in found.modules.items():
        module = _name_in_file(roles)
        term = build_term(ModuleTensors(module, parts[0].name, _values(roles, tensors), settings))
        _check_height(module, term, parts, spec)
        terms |= split_term(term, parts)
    return terms


def _text_terms(
    found: Recognised, component: str, tensors: Tensors, metadata: Mapping[str, str]
) -> dict[str, LinearTerm]:
    """Terms of one text encoder by linear."""
    settings = read_peft_settings(metadata, component)
    return {
        name: build_term(ModuleTensors(_name_in_file(roles), name, _values(roles, tensors), settings))
        for name, roles in found.text[component].items()
    }


def _values(roles: Roles, tensors: Tensors) -> dict[Role, torch.Tensor]:
    return {role: tensors[key] for role, key in roles.items()}


def _name_in_file(roles: Roles) -> str:
    """What the file calls the module that these are the keys of."""
    key = next(iter(roles.values()))
    return next(key.removesuffix(ending) for ending in ENDINGS if key.endswith(ending))


def _check_height(module: str, term: LinearTerm, parts: tuple[Part, ...], spec: FluxSpec) -> None:
    """A fused module has exactly the rows of its parts; other modules are checked by the adapter itself."""
    rows = [stop for part in parts for _, stop in part.rows]
    if rows and term.shape[0] != max(rows):
        raise wrong_size(spec, module, term.shape, (max(rows), spec.width))
