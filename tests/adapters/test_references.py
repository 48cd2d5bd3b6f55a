"""Our files, read by diffusers and PEFT, do in their hands what they do in ours."""

from __future__ import annotations

import peft
import pytest
import torch
from diffusers import FluxPipeline
from diffusers.loaders.lora_conversion_utils import _convert_bfl_flux_control_lora_to_diffusers
from safetensors.torch import load_file
from torch import nn

from gossamer.adapters import attach, read_adapter, write_adapter
from gossamer.errors import FileDamagedError
from gossamer.models.flux_spec import FluxSpec

FULL = FluxSpec(19, 38, 24, 128, 64, 64, 4096, 768, True)

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def is_block_linear(name):
    return "transformer_blocks" in name


def loaded(pipe, path):
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    return pipe.transformer


@pytest.mark.parametrize("multiplier", [1.0, 0.25])
def test_diffusers_spelling_as_peft_applies_it(
    make_adapter, make_model, quantized, paint, pipeline, spec, tmp_path, multiplier
):
    path = tmp_path / "style.safetensors"
    write_adapter(make_adapter(multiplier=multiplier), path, "diffusers")
    reference = loaded(pipeline(make_model()), path)
    ours = quantized()
    before = paint(ours)
    attach(ours, read_adapter(path, spec), "style")
    torch.testing.assert_close(paint(ours), paint(reference), **CLOSE)
    assert (paint(ours) - before).abs().max() > 0.01, "the adapter must change something for this to mean anything"


def test_alpha_in_the_header_that_diffusers_writes(
    make_adapter, make_model, quantized, paint, pipeline, spec, tmp_path
):
    source = tmp_path / "source.safetensors"
    write_adapter(make_adapter(is_block_linear), source, "diffusers")
    settings = {"r": 4, "lora_alpha": 2, "alpha_pattern": {"attn.to_q": 8}, "target_modules": ["to_q"]}
    factors = {key.removeprefix("transformer."): value for key, value in load_file(source).items()}
    FluxPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=factors,
        weight_name="saved.safetensors",
        transformer_lora_adapter_metadata=settings | {"target_modules": _modules(factors)},
    )
    reference = loaded(pipeline(make_model()), tmp_path / "saved.safetensors")
    adapter = read_adapter(tmp_path / "saved.safetensors", spec)
    assert adapter.terms["transformer_blocks.0.attn.to_q"].multiplier == 2.0
    assert adapter.terms["transformer_blocks.0.attn.to_k"].multiplier == 0.5
    ours = quantized()
    attach(ours, adapter, "saved")
    torch.testing.assert_close(paint(ours), paint(reference), **CLOSE)


def _modules(factors):
    return sorted({key.removesuffix(".lora_A.weight") for key in factors if key.endswith(".lora_A.weight")})


@pytest.mark.parametrize("multiplier", [1.0, 0.25])
def test_kohya_spelling_as_diffusers_converts_it(
    make_adapter, make_model, quantized, paint, pipeline, spec, tmp_path, multiplier
):
    # diffusers' conversion knows `linear1` only at width 3072; the next test has it
    wanted = make_adapter(
        lambda name: is_block_linear(name) and not name.startswith("single_transformer_blocks.0.attn")
        and not name.endswith("proj_mlp"),
        multiplier=multiplier,
    )  # fmt: skip
    path = tmp_path / "style.safetensors"
    write_adapter(wanted, path, "kohya")
    reference = loaded(pipeline(make_model()), path)
    ours = quantized()
    attach(ours, read_adapter(path, spec), "style")
    torch.testing.assert_close(paint(ours), paint(reference), **CLOSE)


@pytest.mark.parametrize("rank", [1, 4])
def test_kohya_names_at_full_size(make_adapter, tmp_path, rank):
    """Rank 1 is fused with its parts stacked; diffusers splits by its own rule, so the products are compared."""
    adapter = make_adapter(lambda name: ".0." in f".{name}." or "blocks" not in name, rank=rank, spec=FULL)
    path = tmp_path / "full.safetensors"
    write_adapter(adapter, path, "kohya")
    theirs = FluxPipeline.lora_state_dict(str(tmp_path), weight_name=path.name)
    found = {key.removeprefix("transformer.") for key in theirs}
    assert found == {f"{name}.lora_{side}.weight" for name in adapter.terms for side in "AB"}
    ours = read_adapter(path, FULL)
    for key in theirs:
        if key.endswith(".lora_A.weight"):
            stem = key.removesuffix(".lora_A.weight")
            term = ours.terms[stem.removeprefix("transformer.")]
            rows = slice(None, None, 97)
            product = theirs[f"{stem}.lora_B.weight"][rows] @ theirs[key][:, rows]
            torch.testing.assert_close(term.multiplier * term.up[rows] @ term.down[:, rows], product, **CLOSE)


def test_bfl_control_names_at_full_size(make_adapter, tmp_path):
    adapter = make_adapter(rank=2, bias=True, norms=True, channels=128, spec=FULL)
    path = tmp_path / "control.safetensors"
    write_adapter(adapter, path, "bfl")
    ours = read_adapter(path, FULL)
    theirs = _convert_bfl_flux_control_lora_to_diffusers(load_file(path))
    theirs = {key.removeprefix("transformer."): value for key, value in theirs.items()}
    # diffusers 0.42.1 swaps the halves of this factor's rank too, which breaks its product with lora_B; undone here
    final = theirs["norm_out.linear.lora_A.weight"]
    theirs["norm_out.linear.lora_A.weight"] = torch.cat(final.chunk(2)[::-1])
    assert ours.is_control
    assert {key for key in theirs if "lora" not in key} == set(ours.replacements)
    for name, values in ours.replacements.items():
        assert torch.equal(values, theirs[name])
    rows = slice(None, None, 97)
    for name, term in ours.terms.items():
        product = theirs[f"{name}.lora_B.weight"][rows] @ theirs[f"{name}.lora_A.weight"][:, rows]
        torch.testing.assert_close(term.up[rows] @ term.down[:, rows], product, **CLOSE)
        assert torch.equal(term.bias, theirs[f"{name}.lora_B.bias"])


def test_control_as_diffusers_widens_it(control, make_model, quantized, paint, control_pipeline, spec, tmp_path):
    path = tmp_path / "control.safetensors"
    write_adapter(control, path, "diffusers")
    reference = loaded(control_pipeline(make_model()), path)
    ours = quantized()
    attach(ours, read_adapter(path, spec), "control")
    torch.testing.assert_close(paint(ours, 128), paint(reference, 128), **CLOSE)


def test_all_spellings_do_the_same(control, quantized, paint, spec, tmp_path):
    pictures = []
    for spelling in ("diffusers", "bfl"):
        path = tmp_path / f"{spelling}.safetensors"
        write_adapter(control, path, spelling)
        model = quantized()
        attach(model, read_adapter(path, spec), "control")
        pictures.append(paint(model, 128))
    torch.testing.assert_close(pictures[0], pictures[1], **CLOSE)


def test_a_folder_that_peft_saved(make_model, quantized, paint, spec, tmp_path):
    """The strength is in the settings beside the weights: alpha is twice the rank, for one layer half of it."""
    targets = [name for name, part in make_model().named_modules() if isinstance(part, nn.Linear)]
    targets = [name for name in targets if is_block_linear(name)]
    config = peft.LoraConfig(r=4, lora_alpha=8, alpha_pattern={"attn.to_q": 2}, target_modules=targets)
    reference = peft.get_peft_model(make_model(), config)
    torch.manual_seed(0)
    for name, parameter in reference.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.05
    reference.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path / "adapter_model.safetensors", spec)
    assert adapter.terms["transformer_blocks.0.attn.to_q"].multiplier == 0.5
    assert adapter.terms["transformer_blocks.0.attn.to_k"].multiplier == 2.0
    ours = quantized()
    attach(ours, adapter, "saved")
    torch.testing.assert_close(paint(ours), paint(reference), **CLOSE)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(FileDamagedError, match=r"adapter_config\.json"):
        read_adapter(tmp_path / "adapter_model.safetensors", spec)
