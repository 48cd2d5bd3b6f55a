"""How much memory loading takes beside what it keeps, measured by the system on a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint_writer as writer
from gossamer.models.flux import FluxTransformer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process from /proc")

# a FLUX.1 of width 512: large enough that a tenth of its file is more than what Python itself takes on the way
SIZES = {"num_layers": 2, "num_single_layers": 20, "num_attention_heads": 4, "joint_attention_dim": 512}

CASES = [("bf16", "stored"), ("bf16", "nf4"), ("gguf", "stored")]

MEASURE = """
import json, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import gossamer

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

def measure(small, file, storage):
    gossamer.load_transformer(small, storage=storage)  # everything is imported and set up by now
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    kept = gossamer.weight_bytes(gossamer.load_transformer(file, storage=storage))
    return {"extra": status("VmHWM") - before - kept, "kept": kept}

print(json.dumps([measure(*case) for case in json.loads(sys.argv[1])]))
"""


def shapes(**sizes):
    with torch.device("meta"):
        model = FluxTransformer(**{"pooled_projection_dim": 128, **sizes})
    return {name: tuple(tensor.shape) for name, tensor in writer.to_bfl(model.state_dict()).items()}


def save(path: Path, named, layout):
    if layout == "bf16":
        return writer.save_hole(path.with_suffix(".safetensors"), {name: ("BF16", s) for name, s in named.items()})
    kinds = {name: ("F32" if len(shape) == 1 else "Q8_0", shape) for name, shape in named.items()}
    return writer.save_gguf_hole(path.with_suffix(".gguf"), kinds, "flux")


def test_loading_takes_little_more_than_it_keeps(tmp_path):
    """At most the largest tensor and a tenth of the file."""
    named = shapes(**SIZES)
    one = shapes(num_layers=1, num_single_layers=1, num_attention_heads=1, joint_attention_dim=32)
    files = {layout: save(tmp_path / "flux", named, layout) for layout, _ in CASES}
    small = {layout: save(tmp_path / "small", one, layout) for layout in files}
    cases = json.dumps([(str(small[layout]), str(files[layout]), storage) for layout, storage in CASES])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, cases]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    largest = max(torch.Size(shape).numel() for shape in named.values())
    for (layout, storage), measured in zip(CASES, json.loads(done.stdout), strict=True):
        size = files[layout].stat().st_size
        assert measured["kept"] > 0.25 * size, "the model was loaded"
        assert measured["extra"] <= largest * (2 if layout == "bf16" else 1.0625) + 0.1 * size, (layout, storage)
