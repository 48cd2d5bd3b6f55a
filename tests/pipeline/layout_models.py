"""The embedded model with other weights, and pictures of it: for tests of the layouts that files are found in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

import checkpoint_writer as writer
import gossamer
from gossamer.demo.embedded import model_folder

PROMPT = "a red sphere on top of a blue cube"
QUICK = {"seed": 3, "steps": 1, "size": (64, 64)}

Tensors = Mapping[str, torch.Tensor]


def paint(model, **options) -> np.ndarray:
    """A quick picture of a model."""
    return painted(gossamer.load(model, **options))


def painted(pipe: gossamer.Pipeline) -> np.ndarray:
    """The same of one that is loaded."""
    return np.asarray(pipe(PROMPT, **QUICK))


def farthest(one: np.ndarray, other: np.ndarray) -> int:
    """The largest difference of a channel."""
    return int(np.abs(one.astype(int) - other).max())


def transformer() -> dict[str, torch.Tensor]:
    """The embedded model's, with diffusers names."""
    return writer.read_component(model_folder(), "transformer")


def is_quantised(name: str, tensor: torch.Tensor) -> bool:
    """What bitsandbytes packs in a folder: linears but the last one, which diffusers leaves as it is; no embeddings."""
    return tensor.dim() == 2 and name != "proj_out.weight" and not any(word in name for word in ("shared", "relative"))


def folder_with(path: Path, component: str, tensors: Tensors) -> Path:
    """The embedded model with other weights in one component."""
    return folder_of(path, {component: tensors})


def folder_of(path: Path, components: Mapping[str, Tensors], quantization: dict[str, Any] | None = None) -> Path:
    """The embedded model with other weights in these components, and what their configs say of how they are stored."""
    copy = Path(shutil.copytree(model_folder(), path))
    for component, tensors in components.items():
        for file in (copy / component).glob("*.safetensors*"):
            file.unlink()
        stem = "diffusion_pytorch_model" if component in ("transformer", "vae") else "model"
        named = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(named, copy / component / f"{stem}.safetensors", {"format": "pt"})
        if quantization is not None:
            config = json.loads((copy / component / "config.json").read_text())
            (copy / component / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return copy
