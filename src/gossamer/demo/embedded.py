"""Where the embedded model and its bundled adapters are on disk."""

from __future__ import annotations

from pathlib import Path


def model_folder() -> Path:
    """The embedded model, a standard diffusers folder."""
    return Path(__file__).parent / "model"


def adapter_paths() -> dict[str, Path]:
    """The bundled adapters by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "adapters").glob("*.safetensors"))}
