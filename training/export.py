"""Step 5 of the recipe: trained weights -> the diffusers folder and the adapters in their real spellings, in bf16.

python training/export.py --runs runs --out src/gossamer/demo
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from architecture import TEXT_TOKENS, build_transformer, save_pipeline
from denoiser import Denoiser
from gossamer.adapters import Adapter, LowRankTerm, write_adapter
from gossamer.models.flux_spec import FluxSpec
from train_transformer import load_autoencoder

SPELLINGS = {"pencil": "diffusers", "neon": "kohya", "edges": "bfl"}
TITLES = {
    "pencil": "Pencil sketch on paper",
    "neon": "Neon outlines in the dark",
    "edges": "Control LoRA: edge map to picture",
}


def export_model(runs: Path, vae: Path, folder: Path) -> None:
    """Writes the pipeline folder; the tokenizers are there already."""
    model = Denoiser(folder)
    model.load_state_dict(load_file(runs / "base" / "base.safetensors"))
    autoencoder = load_autoencoder(vae)
    save_pipeline(folder, model.transformer, autoencoder, model.clip, model.t5)
    (folder / "gossamer.json").write_text(json.dumps({"max_sequence_length": TEXT_TOKENS}, indent=2) + "\n")


def read_state(path: Path) -> Adapter:
    """PEFT's raw state as a canonical adapter in bf16."""
    state = {name: value.bfloat16() for name, value in load_file(path).items()}
    modules = sorted({name.split(".lora_")[0] for name in state if ".lora_" in name})
    terms = {module: term(state, module) for module in modules}
    norms = {name: value for name, value in state.items() if ".lora_" not in name}
    return Adapter(FluxSpec.from_config(build_transformer().config), terms, norms)


def term(state: dict[str, Tensor], module: str) -> LowRankTerm:
    """One module's factors; the recipe trains with alpha = rank."""
    down, up = state[f"{module}.lora_A.weight"], state[f"{module}.lora_B.weight"]
    return LowRankTerm(down, up, bias=state.get(f"{module}.lora_B.bias"))


def export_adapters(runs: Path, folder: Path) -> None:
    """Writes each adapter in its spelling."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, spelling in SPELLINGS.items():
        metadata = {"base_model": "gossamer-embedded", "title": TITLES[name]}
        write_adapter(
            read_state(runs / name / f"{name}.safetensors"), folder / f"{name}.safetensors", spelling, metadata
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--vae", type=Path, help="default: the one in --runs; the shipped folder model/vae works too")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with torch.no_grad():
        vae = options.vae or options.runs / "vae" / "vae.safetensors"
        export_model(options.runs, vae, options.out / "model")
        export_adapters(options.runs, options.out / "adapters")
    reader = options.runs / "reader" / "reader.safetensors"
    if reader.exists():
        shutil.copy(reader, options.out / "reader.safetensors")


if __name__ == "__main__":
    main()
