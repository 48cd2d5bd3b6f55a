"""What an adapter or checkpoint file holds, from its header alone: `gossamer inspect`.

Every tensor name is either used by what it was recognised as, or listed as unused. Nothing is loaded.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from gossamer.adapters.adapter import stated_base_model
from gossamer.adapters.families import ADAPTER
from gossamer.adapters.kinds import size_of
from gossamer.adapters.spelling import Recognised, recognise
from gossamer.checkpoints.checkpoint import Checkpoint, Component, open_checkpoint
from gossamer.checkpoints.containers import open_source
from gossamer.checkpoints.families import other_family
from gossamer.checkpoints.layouts import TRANSFORMER
from gossamer.checkpoints.safetensors_file import TensorEntry, sha256_file
from gossamer.checkpoints.single_tensor import GGUF_BLOCKS
from gossamer.memory.model_specs import FLUX_DEV
from gossamer.models.flux_config import GUIDANCE, count_blocks
from gossamer.models.flux_spec import FluxSpec

EMBEDDED_BLOCKS = (2, 4)
COMPONENTS = ("transformer", "text_encoder", "text_encoder_2")

INPUT_LAYER = "x_embedder.weight"

# by input channels: the model without a guidance embedder, and with one
INPUT_WIDTHS: Mapping[int, tuple[str, str]] = {
    64: ("FLUX.1-schnell", "FLUX.1-dev"),
    128: ("FLUX.1-Canny-dev or -Depth-dev",) * 2,
    384: ("FLUX.1-Fill-dev",) * 2,
}

# texts of a trainer's metadata that people look for
TRIGGER_KEYS = ("modelspec.trigger_phrase", "trigger_word", "trigger_words", "instance_prompt", "ss_trigger_words")


@dataclass(frozen=True)
class Inspection:
    """The answer of `gossamer inspect`; `modules` counts adapted or stored linears by component."""

    kind: str
    layout: str
    model: str
    total: int
    used: int
    unused: tuple[str, ...]
    modules: Mapping[str, int]
    ranks: tuple[int, ...]
    storage: Mapping[str, int]
    parameters: int
    base_model: str | None = None
    trigger: str | None = None
    sha256: str | None = None
    notes: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, object]:
        """The answer as JSON values."""
        answer: dict[str, object] = {
            "kind": self.kind,
            "layout": self.layout,
            "model": self.model,
            "keys": {"total": self.total, "used": self.used, "unused": list(self.unused)},
            "modules": {component: self.modules.get(component, 0) for component in COMPONENTS},
            "ranks": list(self.ranks),
            "storage": dict(self.storage),
            "parameters": self.parameters,
        }
        return answer if self.sha256 is None else {**answer, "sha256": self.sha256}


def inspect(path: Path | str, with_hash: bool = False) -> Inspection:
    """Look at the header of a file, or at those of all shards of a model; with a hash, read all of the file."""
    source = open_source(path)
    is_adapter = any(map(ADAPTER.search, source.entries))
    found = _adapter(source.entries) if is_adapter else _checkpoint(open_checkpoint(path))
    trigger = next((source.metadata[key] for key in TRIGGER_KEYS if source.metadata.get(key)), None)
    return replace(
        found,
        base_model=stated_base_model(source.metadata),
        trigger=trigger,
        sha256=sha256_file(path) if with_hash else None,
    )


def _parameters(entries: Iterable[TensorEntry]) -> int:
    return sum(math.prod(entry.shape) for entry in entries)


# adapters -------------------------------------------------------------------------------------------------------------


def _adapter(tensors: Mapping[str, TensorEntry]) -> Inspection:
    keys = list(tensors)
    found = recognise(keys, _spec_of(keys))
    return Inspection(
        kind="adapter",
        layout=found.spelling.name,
        model=_adapted_model(found, tensors),
        total=len(keys),
        used=len(keys) - len(found.unused),
        unused=tuple(found.unused),
        modules={TRANSFORMER: len(found.modules), **{name: len(linears) for name, linears in found.text.items()}},
        ranks=_ranks(found, tensors),
        storage=Counter(entry.dtype for entry in tensors.values()),
        parameters=_parameters(tensors.values()),
    )


def _spec_of(keys: Iterable[str]) -> FluxSpec:
    """FLUX.1-dev's sizes, deeper where the file has more blocks."""
    depth = {"double": 0, "single": 0}
    for key in keys:
        for kind, pattern in (
            ("single", r"single_(?:transformer_)?blocks[._](\d+)"),
            ("double", r"(?:double|transformer)_blocks[._](\d+)"),
        ):
            match = re.search(pattern, key)
            if match:
                depth[kind] = max(depth[kind], int(match[1]) + 1)
                break
    return replace(
        FLUX_DEV,
        num_layers=max(FLUX_DEV.num_layers, depth["double"]),
        num_single_layers=max(FLUX_DEV.num_single_layers, depth["single"]),
    )


def _sizes(found: Recognised, tensors: Mapping[str, TensorEntry]) -> list[tuple[int, int | None]]:
    """(out, rank) of every module of the transformer that says so, of any family of adapters."""
    shapes = ({role: tensors[key].shape for role, key in roles.items()} for roles in found.modules.values())
    return [size for of_one in shapes if (size := size_of(of_one)) is not None]


def _adapted_model(found: Recognised, tensors: Mapping[str, TensorEntry]) -> str:
    """By the width of what the adapter's terms change."""
    if not found.modules:
        return "unknown"
    width = Counter(out for out, _ in _sizes(found, tensors)).most_common(1)
    return "FLUX.1" if width and width[0][0] % FLUX_DEV.width == 0 else "a FLUX.1 of another size"


def _ranks(found: Recognised, tensors: Mapping[str, TensorEntry]) -> tuple[int, ...]:
    return tuple(sorted({rank for _, rank in _sizes(found, tensors) if rank is not None}))


# checkpoints ----------------------------------------------------------------------------------------------------------


def _checkpoint(checkpoint: Checkpoint) -> Inspection:
    """What loading would use: the same names are recognised, by the same code."""
    entries, components = checkpoint.source.entries, checkpoint.components
    unused = (*checkpoint.unknown, *checkpoint.unneeded)
    return Inspection(
        kind="checkpoint",
        layout=checkpoint.layout.name,
        model=_model(checkpoint),
        total=len(entries),
        used=len(entries) - len(unused),
        unused=unused,
        modules={name: _linears(component) for name, component in components.items()},
        ranks=(),
        storage=Counter(entry.dtype for entry in entries.values()),
        parameters=sum(component.parameters for component in components.values()),
        notes=tuple(name for name in checkpoint.encodings if name != GGUF_BLOCKS.name),
    )


def _linears(component: Component) -> int:
    """Weights of linears as the file has them: a fused one counts once."""
    entries = component.source.entries
    return sum(name.endswith(".weight") and len(entries[name].shape) == 2 for name in component.origins)


def _model(checkpoint: Checkpoint) -> str:
    transformer = checkpoint.components.get(TRANSFORMER)
    if transformer is None:
        return other_family(list(checkpoint.source.entries)) or "no transformer"
    blocks = count_blocks(transformer.names)
    if blocks == EMBEDDED_BLOCKS:
        return "the embedded model"
    if blocks != (FLUX_DEV.num_layers, FLUX_DEV.num_single_layers):
        return f"a FLUX.1 of {blocks[0]} double and {blocks[1]} single blocks"
    guidance = any(name.startswith(GUIDANCE) for name in transformer.names)
    channels = transformer.header_shape(INPUT_LAYER)[-1] if INPUT_LAYER in transformer.names else 0
    if channels not in INPUT_WIDTHS:
        return f"a FLUX.1 with {channels} input channels"
    return INPUT_WIDTHS[channels][guidance]
