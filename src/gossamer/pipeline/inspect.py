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
from gossamer.adapters.spelling import Recognised, recognise
from gossamer.checkpoints import gguf_file
from gossamer.checkpoints.flux_names import bfl_linears, bfl_norms
from gossamer.checkpoints.layouts import MARKERS, TRANSFORMER, Layout, find_layout
from gossamer.checkpoints.safetensors_file import TensorEntry, read_header, sha256_file
from gossamer.models.flux_spec import FluxSpec, linear_shapes, norm_shapes

FLUX_DEV = FluxSpec(19, 38, 24, 128, 64, 64, 4096, 768, guidance_embeds=True)
EMBEDDED_BLOCKS = (2, 4)
COMPONENTS = ("transformer", "text_encoder", "text_encoder_2")

# what stands beside a weight and belongs to how it is stored
COMPANIONS = (
    *(marker.ending for marker in MARKERS),
    *(
        ".scale_input",
        ".input_scale",
        ".pre_quant_scale",
        ".absmax",
        ".quant_map",
        ".nested_absmax",
        ".nested_quant_map",
    ),
)
FOUR_BIT_STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
FILE_MARKERS = ("scaled_fp8",)  # a tensor without a module: says something of the whole file

INPUT_LAYERS = ("img_in", "x_embedder")

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
    """Look at the header of a file; with a hash, read all of it."""
    tensors, metadata = _gguf(path) if Path(path).suffix.lower() == ".gguf" else _safetensors(path)
    found = (_adapter if any(map(ADAPTER.search, tensors)) else _checkpoint)(tensors)
    trigger = next((metadata[key] for key in TRIGGER_KEYS if metadata.get(key)), None)
    return replace(
        found,
        base_model=stated_base_model(metadata),
        trigger=trigger,
        sha256=sha256_file(path) if with_hash else None,
    )


def _safetensors(path: Path | str) -> tuple[Mapping[str, TensorEntry], Mapping[str, str]]:
    header = read_header(path)
    return header.tensors, header.metadata


def _gguf(path: Path | str) -> tuple[Mapping[str, TensorEntry], Mapping[str, str]]:
    """The header of a GGUF file in the words of a safetensors one; types are block types."""
    header = gguf_file.read_header(path)
    entries = header.tensors.items()
    texts = {key: value for key, value in header.metadata.items() if isinstance(value, str)}
    return {name: TensorEntry(each.type_name, each.shape, each.start, each.stop) for name, each in entries}, texts


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


def _adapted_model(found: Recognised, tensors: Mapping[str, TensorEntry]) -> str:
    """By the width of what the adapter's factors read."""
    if not found.modules:
        return "unknown"
    width = Counter(tensors[roles["up"]].shape[0] for roles in found.modules.values() if "up" in roles).most_common(1)
    return "FLUX.1" if width and width[0][0] % FLUX_DEV.width == 0 else "a FLUX.1 of another size"


def _ranks(found: Recognised, tensors: Mapping[str, TensorEntry]) -> tuple[int, ...]:
    downs = (tensors[roles["down"]].shape for roles in found.modules.values() if "down" in roles)
    return tuple(sorted({shape[0] for shape in downs if shape}))


# checkpoints ----------------------------------------------------------------------------------------------------------


def _checkpoint(tensors: Mapping[str, TensorEntry]) -> Inspection:
    layout = find_layout(tensors)
    unused = [
        *_unknown_transformer_names(layout, tensors),
        *(name for name in layout.other if name not in FILE_MARKERS),
    ]
    return Inspection(
        kind="checkpoint",
        layout=layout.name,
        model=_model(layout, tensors),
        total=len(tensors),
        used=len(tensors) - len(unused),
        unused=tuple(unused),
        modules={component: _linears(names, tensors) for component, names in layout.components.items()},
        ranks=(),
        storage=Counter(entry.dtype for entry in tensors.values()),
        parameters=sum(_values(name, tensors) for name in tensors if not name.endswith(COMPANIONS)),
        notes=layout.markers,
    )


def _values(name: str, tensors: Mapping[str, TensorEntry]) -> int:
    """Values of a tensor; four-bit codes stand two in a byte."""
    packed = any(f"{name}{ending}" in tensors for ending in FOUR_BIT_STATES)
    return math.prod(tensors[name].shape) * (2 if packed else 1)


def _linears(names: Iterable[str], tensors: Mapping[str, TensorEntry]) -> int:
    return sum(name.endswith(".weight") and len(tensors[name].shape) == 2 for name in names)


def _blocks(names: Iterable[str], layout: Layout) -> tuple[int, int]:
    bare = [name.removeprefix(layout.prefix) for name in names]
    double = {match[1] for name in bare if (match := re.match(r"(?:double|transformer)_blocks\.(\d+)\.", name))}
    single = {match[1] for name in bare if (match := re.match(r"single_(?:transformer_)?blocks\.(\d+)\.", name))}
    return len(double), len(single)


def _unknown_transformer_names(layout: Layout, tensors: Mapping[str, TensorEntry]) -> list[str]:
    """Transformer tensors that a FLUX.1 of this depth does not have."""
    names = layout.components.get(TRANSFORMER, ())
    double, single = _blocks(names, layout)
    spec = replace(FLUX_DEV, num_layers=double, num_single_layers=single)
    if layout.naming == "diffusers":
        linears, norms = set(linear_shapes(spec)), set(norm_shapes(spec))
    else:
        linears, norms = set(bfl_linears(double, single, spec.width, guidance=True)), set(bfl_norms(double, single))
    known = norms | {f"{linear}.{part}" for linear in linears for part in ("weight", "bias")}
    return [name for name in names if not _is_known(name.removeprefix(layout.prefix), known, linears)]


def _is_known(name: str, known: set[str], linears: set[str]) -> bool:
    companion = next((ending for ending in COMPANIONS if name.endswith(ending)), None)
    if companion is None:
        return name in known
    stem = name.removesuffix(companion)
    return stem in linears or stem in known


def _model(layout: Layout, tensors: Mapping[str, TensorEntry]) -> str:
    names = layout.components.get(TRANSFORMER, ())
    if not names:
        return "no transformer"
    blocks = _blocks(names, layout)
    if blocks == EMBEDDED_BLOCKS:
        return "the embedded model"
    if blocks != (FLUX_DEV.num_layers, FLUX_DEV.num_single_layers):
        return f"a FLUX.1 of {blocks[0]} double and {blocks[1]} single blocks"
    bare = {name.removeprefix(layout.prefix) for name in names}
    guidance = any(name.startswith(("guidance_in.", "time_text_embed.guidance_embedder.")) for name in bare)
    channels = next((_inputs(layout.prefix + name, tensors) for name in INPUT_LAYERS if f"{name}.weight" in bare), 0)
    if channels not in INPUT_WIDTHS:
        return f"a FLUX.1 with {channels} input channels"
    return INPUT_WIDTHS[channels][guidance]


def _inputs(linear: str, tensors: Mapping[str, TensorEntry]) -> int:
    """Inputs of a linear, however its values are packed."""
    bias = tensors.get(f"{linear}.bias")
    return _values(f"{linear}.weight", tensors) // (bias.shape[0] if bias is not None and bias.shape else 1)
