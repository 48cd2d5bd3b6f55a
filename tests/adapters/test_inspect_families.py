"""`gossamer inspect` on adapters of every family: all keys used, ranks and modules counted, from headers alone."""

from __future__ import annotations

import json

import families
import pytest
import torch
import wild
from safetensors.torch import save_file

from gossamer.pipeline.inspect import inspect

RANKS = {
    "LoKr, whole": [],
    "LoKr, second factored": [2],
    "LoKr, both factored": [2],
    "LoKr, first factored": [2],
    "LoKr, core": [2],
    "LoHa": [3],
    "LoHa, core": [3],
    "difference": [],
    "DoRA of rows": [3],
    "DoRA of PEFT": [3],
    "DoRA over LoKr": [2],
}


def write_hole(path, shapes):
    """A safetensors file of 8-bit floats whose data is never written."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        header[name] = {"dtype": "F8_E4M3", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


@pytest.mark.parametrize("name", RANKS)
def test_a_full_size_file(name, tmp_path):
    family, made, shapes = families.FAMILIES[name], {}, {}
    for module, shape in wild.bfl(wild.FULL).items():
        if shape not in made:
            with torch.device("meta"):
                made[shape] = family.file(shape, None)
        shapes |= {
            f"lora_unet_{module.replace('.', '_')}{end}": tuple(value.shape) for end, value in made[shape].items()
        }
    found = inspect(write_hole(tmp_path / "family.safetensors", shapes)).as_json()
    assert (found["kind"], found["model"], found["layout"]) == ("adapter", "FLUX.1", "kohya")
    assert found["keys"] == {"total": len(shapes), "used": len(shapes), "unused": []}
    assert found["modules"] == {"transformer": 314, "text_encoder": 0, "text_encoder_2": 0}
    assert found["ranks"] == RANKS[name]


def test_norms_and_a_factor_that_is_missing(tmp_path):
    tensors = {
        "lycoris_transformer_blocks_0_attn_norm_q.w_norm": torch.ones(128),
        "lycoris_transformer_blocks_0_attn_to_q.lokr_w1": torch.ones(4, 4),
        "lycoris_transformer_blocks_0_attn_to_k.diff": torch.ones(3072),
        "lycoris_transformer_blocks_0_attn_norm_q.b_norm": torch.ones(128),
    }
    save_file(tensors, tmp_path / "odd.safetensors")
    found = inspect(tmp_path / "odd.safetensors")
    assert (found.total, found.used) == (4, 3)
    assert found.unused == ("lycoris_transformer_blocks_0_attn_norm_q.b_norm",)
    assert found.ranks == ()
