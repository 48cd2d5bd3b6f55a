"""Which storage format a part's weights are in: the one that a run may name instead of "stored"."""

from __future__ import annotations

from fnmatch import fnmatchcase

from gossamer.checkpoints.checkpoint import Component
from gossamer.formats import packing_names, plain
from gossamer.models.flux_spec import SENSITIVE
from gossamer.pipeline.options import STORED

# weights of text encoders that are looked up, not multiplied with
LOOKED_UP = ("shared.*", "*embed_tokens.*", "*embedding*", "*relative_attention_bias.*")


def stored_format(component: Component) -> str:
    """The format that would keep every linear as it is stored; "stored" where no single one does.

    A quantised format leaves the sensitive linears of a transformer alone, so those may be stored otherwise.
    """
    storage, entries = component.storage(), component.source.entries
    linears = {
        part.name: storage[part.name]
        for origin in component.origins.values()
        for part in origin.parts
        if part.name.endswith(".weight") and len(entries[origin.weight].shape) > 1
    }
    sensitive = [f"{name}.weight" for name in SENSITIVE] if component.name == "transformer" else []
    every = {kind for name, kind in linears.items() if not _fits(name, LOOKED_UP)}
    large = {kind for name, kind in linears.items() if not _fits(name, (*LOOKED_UP, *sensitive))}
    if len(every) == 1:
        only = next(iter(every))
    else:
        only = next(iter(large)) if len(large) == 1 and not large & set(plain.DTYPES) else STORED
    return only if only in packing_names() else STORED


def one_format(formats: set[str]) -> str:
    """The format of several parts together."""
    return next(iter(formats)) if len(formats) == 1 else STORED


def _fits(name: str, patterns: tuple[str, ...] | list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
