"""Write an adapter file in any spelling that can say what the adapter holds."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save

from gossamer.adapters.adapter import Adapter, LowRankTerm
from gossamer.adapters.fused import join_terms
from gossamer.adapters.peft_settings import KEY as PEFT_SETTINGS
from gossamer.adapters.spelling_tables import Role, Spelling, Written, find_written
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
    prefix = written.prefix
    terms: dict[str, LowRankTerm | None] = {
        prefix + module: join_terms(adapter.terms, parts) for module, parts in spelling.modules(adapter.spec).items()
    }
    terms |= _text_terms(adapter, spelling, written)
    tensors: dict[str, torch.Tensor] = {}
    for module, term in terms.items():
        if term is not None:
            tensors |= {module + ending: value for ending, value in _endings(term, spelling, written).items()}
    file_names = {name: file_name for file_name, name in spelling.norms(adapter.spec).items()}
    if adapter.replacements and not file_names:
        raise _cannot_say(spelling, "replaced norm scales")
    tensors |= {f"{prefix}{file_names[name]}": values for name, values in adapter.replacements.items()}
    # the parts of a fused module share their `down`, which a safetensors file does not allow
    return {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}


def _text_terms(adapter: Adapter, spelling: Spelling, written: Written) -> dict[str, LowRankTerm]:
    named: dict[str, LowRankTerm] = {}
    for component, terms in adapter.text.items():
        if component not in written.text_prefixes:
            raise _cannot_say(spelling, f"terms of the {component}")
        for name, term in terms.items():
            named[written.text_prefixes[component] + (kohya_name(name) if spelling.underscored else name)] = term
    return named


def _endings(term: LowRankTerm, spelling: Spelling, written: Written) -> dict[str, torch.Tensor]:
    values: dict[Role, torch.Tensor] = {"down": term.down, "up": term.up}
    if term.bias is not None:
        values["bias"] = term.bias
    if term.multiplier != 1 or written.always_alpha:
        values["alpha"] = torch.tensor(term.multiplier * term.rank, dtype=torch.float32)
    missing = [role for role in values if role not in written.endings]
    if missing:
        raise _cannot_say(spelling, f"a {missing[0]}")
    return {written.endings[role]: value for role, value in values.items()}


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
