"""Write an adapter file in any spelling that can say what the adapter holds."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save

from gossamer.adapters.adapter import TRANSFORMER, Adapter
from gossamer.adapters.fused import join_terms
from gossamer.adapters.peft_settings import KEY as PEFT_SETTINGS
from gossamer.adapters.roles import roles_of
from gossamer.adapters.spelling_tables import PEFT_MAGNITUDE, Spelling, Written, find_written
from gossamer.adapters.terms import DecomposedTerm, LinearTerm
from gossamer.checkpoints.flux_names import kohya_name
from gossamer.errors import AdapterError, OutputError


def write_adapter(
    adapter: Adapter, path: Path | str, spelling: str = "diffusers", metadata: Mapping[str, str] | None = None
) -> None:
    """Write the adapter as a safetensors file, whole or not at all.

    `spelling` is "diffusers", "kohya" or "bfl"; `metadata` replaces the adapter's own free text. `alpha` is written
    where it differs from the rank, and always for kohya, whose readers expect it.
    """
    tensors = adapter_tensors(adapter, *find_written(spelling))
    texts = dict(adapter.metadata if metadata is None else metadata)
    texts.pop(PEFT_SETTINGS, None)  # their alphas are written beside the factors, and must not be said twice
    _write_whole(Path(path), save(tensors, {"format": "pt", **texts}))


def adapter_tensors(adapter: Adapter, spelling: Spelling, written: Written) -> dict[str, torch.Tensor]:
    """The tensors of the adapter's file, by key."""
    tensors: dict[str, torch.Tensor] = {}
    terms = _transformer_terms(adapter, spelling, written) | _text_terms(adapter, spelling, written)
    for module, term in terms.items():
        tensors |= {module + ending: value for ending, value in _endings(term, spelling, written).items()}
    tensors |= _replaced_norms(adapter, spelling, written)
    tensors |= _changed_norms(adapter, spelling, written)
    # the parts of a fused module share their `down`, which a safetensors file does not allow
    return {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}


def _transformer_terms(adapter: Adapter, spelling: Spelling, written: Written) -> dict[str, LinearTerm]:
    named: dict[str, LinearTerm] = {}
    for module, parts in spelling.modules(adapter.spec).items():
        try:
            term = join_terms(adapter.terms, parts)
        except LookupError as error:
            kind = "a term that is not low-rank for a part of a fused module"
            raise _cannot_say(spelling, f"{kind}, {error.args[0]!r}") from error
        if term is not None:
            named[written.prefix + module] = term
    return named


def _text_terms(adapter: Adapter, spelling: Spelling, written: Written) -> dict[str, LinearTerm]:
    return {
        _text_prefix(component, spelling, written) + _spelled(name, spelling): term
        for component, terms in adapter.text.items()
        for name, term in terms.items()
    }


def _replaced_norms(adapter: Adapter, spelling: Spelling, written: Written) -> dict[str, torch.Tensor]:
    file_names = {name: file_name for file_name, name in spelling.norms(adapter.spec).items()}
    if adapter.replacements and not file_names:
        raise _cannot_say(spelling, "replaced norm scales")
    return {written.prefix + file_names[name]: values for name, values in adapter.replacements.items()}


def _changed_norms(adapter: Adapter, spelling: Spelling, written: Written) -> dict[str, torch.Tensor]:
    """Differences of norms: `.diff` for a scale, `.diff_b` for a bias."""
    file_names = {name: file_name for file_name, name in spelling.changed_norms(adapter.spec).items()}
    tensors = {}
    for component, differences in adapter.norm_differences.items():
        for parameter, value in differences.items():
            norm, _, attribute = parameter.rpartition(".")
            if component == TRANSFORMER:
                stem = written.prefix + file_names[parameter]
            else:
                stem = _text_prefix(component, spelling, written) + _spelled(norm, spelling)
            tensors[stem + (".diff" if attribute == "weight" else ".diff_b")] = value
    return tensors


def _text_prefix(component: str, spelling: Spelling, written: Written) -> str:
    if component not in written.text_prefixes:
        raise _cannot_say(spelling, f"terms of the {component}")
    return written.text_prefixes[component]


def _spelled(name: str, spelling: Spelling) -> str:
    return kohya_name(name) if spelling.underscored else name


def _endings(term: LinearTerm, spelling: Spelling, written: Written) -> dict[str, torch.Tensor]:
    if isinstance(term, DecomposedTerm) and term.whole:
        raise AdapterError(
            "This adapter cannot be written.",
            f"Its magnitudes are of columns of a fused module that holds {' and '.join(term.whole)}, and no spelling "
            "that is written says which columns belong together.",
            "Use the file that it was read from.",
        )
    values = roles_of(term, always_alpha=written.always_alpha)
    missing = [role for role in values if role not in written.endings]
    if missing:
        raise _cannot_say(spelling, f"a {missing[0]}")
    tensors = {written.endings[role]: value for role, value in values.items()}
    if written.endings.get("magnitude") == PEFT_MAGNITUDE and "magnitude" in values:
        # PEFT's is a vector, and of rows only; others have the shape that says which
        magnitude = tensors.pop(PEFT_MAGNITUDE)
        tensors |= {PEFT_MAGNITUDE: magnitude[:, 0]} if magnitude.shape[1] == 1 else {".dora_scale": magnitude}
    return tensors


def _cannot_say(spelling: Spelling, what: str) -> AdapterError:
    return AdapterError(
        f"This adapter cannot be written in the spelling {spelling.name!r}.",
        f"It holds {what}, for which that spelling has no key.",
        "Write it as 'diffusers', which can say all that an adapter holds.",
    )


def _write_whole(path: Path, content: bytes) -> None:
    """Write beside the target, then rename, so that a reader never sees half a file."""
    if path.suffix != ".safetensors":
        raise OutputError(
            f"An adapter cannot be written to {str(path)!r}.",
            "Programs that read adapters tell the format by the ending .safetensors.",
            "Give a name that ends in .safetensors.",
        )
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(
            f"The adapter cannot be written to {str(path)!r}.",
            f"The system says: {error.strerror or error}.",
            "Check that the folder exists, that you may write into it, and that the disk is not full.",
        ) from error
