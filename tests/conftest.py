"""What the tests of the pipeline and of the command line share: the embedded model, and small adapters for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import gossamer
from gossamer.adapters import Adapter, LowRankTerm, write_adapter
from gossamer.demo.embedded import model_folder
from gossamer.models.flux_spec import FluxSpec, linear_shapes
from gossamer.pipeline import loras
from gossamer.pipeline.model import open_folder

if not torch.cuda.is_available():
    # read when Triton is first imported, which no module does before this line
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def embedded_spec() -> FluxSpec:
    return open_folder(model_folder()).spec


def style_adapter(spec: FluxSpec, seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    shapes = linear_shapes(spec)
    names = [name for name in shapes if name.endswith(("attn.to_q", "proj_mlp"))]
    terms = {
        name: LowRankTerm(
            torch.randn(4, shapes[name][1], generator=generator) * 0.2,
            torch.randn(shapes[name][0], 4, generator=generator) * 0.2,
        )
        for name in names
    }
    return Adapter(spec, terms)


def control_adapter(spec: FluxSpec) -> Adapter:
    generator = torch.Generator().manual_seed(7)
    down = torch.randn(4, 2 * spec.in_channels, generator=generator) * 0.3
    up = torch.randn(spec.width, 4, generator=generator) * 0.3
    return Adapter(spec, {"x_embedder": LowRankTerm(down, up)})


@pytest.fixture(scope="session")
def adapter_files(embedded_spec, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    files = {name: folder / f"{name}.safetensors" for name in ("pencil", "edges")}
    write_adapter(style_adapter(embedded_spec), files["pencil"], "diffusers", {})
    write_adapter(control_adapter(embedded_spec), files["edges"], "bfl", {})
    return files


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """The pictures of these tests are too small to gain from a second thread, and busy machines lose by it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bundled(adapter_files, monkeypatch) -> dict[str, Path]:
    """The small adapters under the bundled names, so that the tests do not depend on what training made."""
    monkeypatch.setattr(loras, "adapter_paths", lambda: adapter_files)
    return adapter_files


@pytest.fixture(scope="session")
def pipe() -> gossamer.Pipeline:
    """Loaded once; a test that attaches something detaches it again."""
    return gossamer.load(storage="nf4")
