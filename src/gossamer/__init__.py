"""Gossamer runs big diffusion transformers in the memory that is there: any storage format, any adapter.

    import gossamer
    pipe = gossamer.load(storage="nf4", loras=["pencil"])
    image = pipe("a red sphere on top of a blue cube", seed=0)
    gossamer.save(image, "outputs/sphere.png")

The names below are imported on first use, so that `import gossamer` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gossamer.errors import GossamerError
    from gossamer.models.swap import QuantizeReport, linear_layers, quantize, weight_bytes
    from gossamer.pipeline.load import load, load_transformer, optimize
    from gossamer.pipeline.options import PaintOptions
    from gossamer.pipeline.painter import Painting, Pipeline
    from gossamer.pipeline.picture import save
    from gossamer.pipeline.rerun import rerun

    __version__: str

_HOMES = {
    "GossamerError": ("gossamer.errors", "GossamerError"),
    "PaintOptions": ("gossamer.pipeline.options", "PaintOptions"),
    "Painting": ("gossamer.pipeline.painter", "Painting"),
    "Pipeline": ("gossamer.pipeline.painter", "Pipeline"),
    "QuantizeReport": ("gossamer.models.swap", "QuantizeReport"),
    "__version__": ("gossamer.pipeline.versions", "VERSION"),
    "linear_layers": ("gossamer.models.swap", "linear_layers"),
    "load": ("gossamer.pipeline.load", "load"),
    "load_transformer": ("gossamer.pipeline.load", "load_transformer"),
    "optimize": ("gossamer.pipeline.load", "optimize"),
    "quantize": ("gossamer.models.swap", "quantize"),
    "rerun": ("gossamer.pipeline.rerun", "rerun"),
    "save": ("gossamer.pipeline.picture", "save"),
    "weight_bytes": ("gossamer.models.swap", "weight_bytes"),
}

__all__ = [
    "GossamerError",
    "PaintOptions",
    "Painting",
    "Pipeline",
    "QuantizeReport",
    "__version__",
    "linear_layers",
    "load",
    "load_transformer",
    "optimize",
    "quantize",
    "rerun",
    "save",
    "weight_bytes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gossamer' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
