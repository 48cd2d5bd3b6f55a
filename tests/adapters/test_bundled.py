"""The bundled adapters: each in its own spelling, read to the last key, seen in pictures, gone without a trace.

Whatever training made of them, so nothing here depends on exact weights.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import gossamer
from gossamer.adapters import Adapter, attach, read_adapter, write_adapter
from gossamer.bench.adherence import held_out_captions
from gossamer.bench.batches import BatchSettings, paint_batches
from gossamer.demo.edges import edge_agreement, edge_map
from gossamer.demo.embedded import adapter_paths, model_folder
from gossamer.demo.render import pack_scenes, render
from gossamer.demo.styles import STYLES, style_score
from gossamer.models.flux_spec import linear_shapes, norm_shapes
from gossamer.models.swap import quantize

SPELLINGS = {"pencil": "diffusers", "neon": "kohya", "edges": "bfl"}
STARTS = {"pencil": "transformer.", "neon": "lora_unet_", "edges": ("double_blocks.", "single_blocks.", "img_in.")}
MOST_RANK = 16
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SIDE, SEEDS = 256, (0, 1)


@pytest.fixture(scope="module")
def bundled_adapters(embedded_spec) -> dict[str, Adapter]:
    return {name: read_adapter(path, embedded_spec) for name, path in adapter_paths().items()}


def keys_of(name):
    with safe_open(adapter_paths()[name], "pt") as file:
        return set(file.keys())


def test_there_are_three():
    assert set(adapter_paths()) == set(SPELLINGS)


@pytest.mark.parametrize("name", SPELLINGS)
def test_each_is_in_its_own_spelling_and_read_to_the_last_key(name, bundled_adapters, embedded_spec, tmp_path):
    adapter = bundled_adapters[name]
    assert adapter.spelling == SPELLINGS[name]
    assert any(key.startswith(STARTS[name]) for key in keys_of(name))
    assert adapter.terms.keys() <= linear_shapes(embedded_spec).keys()
    assert all(torch.count_nonzero(term.up) and torch.count_nonzero(term.down) for term in adapter.terms.values())
    again = tmp_path / "again.safetensors"
    write_adapter(adapter, again, SPELLINGS[name], dict(adapter.metadata))
    with safe_open(again, "pt") as file:
        assert set(file.keys()) == keys_of(name), "what was read says all that the file says"


def test_styles_have_a_small_rank_and_only_the_control_lora_widens(bundled_adapters, embedded_spec):
    for name, adapter in bundled_adapters.items():
        assert adapter.is_control == (name == "edges")
        assert name == "edges" or max(term.rank for term in adapter.terms.values()) <= MOST_RANK
    control = bundled_adapters["edges"]
    assert control.terms["x_embedder"].shape[1] == 2 * embedded_spec.in_channels == 128
    assert control.replacements
    assert control.replacements.keys() <= norm_shapes(embedded_spec).keys()
    assert any(term.bias is not None and term.bias.any() for term in control.terms.values())


# references


def product(term):
    return term.multiplier * (term.up.float() @ term.down.float())


@pytest.mark.parametrize(
    ("name", "down", "up", "alpha"),
    [
        ("neon", "lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "lora_unet_{}.alpha"),
        ("edges", "{}.lora_A.weight", "{}.lora_B.weight", None),
    ],
)
def test_fused_layers_are_split_by_rows(name, down, up, alpha, bundled_adapters):
    """BFL's files keep query, key and value, and in single blocks the first half of the MLP, in one matrix."""
    raw = {key: value.float() for key, value in load_file(adapter_paths()[name]).items()}
    query = ("attn.to_q", "attn.to_k", "attn.to_v")
    text = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
    modules = {
        "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.{part}" for part in query],
        "double_blocks.0.txt_attn.qkv": [f"transformer_blocks.0.{part}" for part in text],
        "single_blocks.0.linear1": [f"single_transformer_blocks.0.{part}" for part in (*query, "proj_mlp")],
    }
    found = 0
    for module, parts in modules.items():
        key = module.replace(".", "_") if alpha else module
        if down.format(key) not in raw:
            continue
        lower, upper = raw[down.format(key)], raw[up.format(key)]
        strength = raw[alpha.format(key)] / lower.shape[0] if alpha else 1.0
        ours = torch.cat([product(bundled_adapters[name].terms[part]) for part in parts])
        torch.testing.assert_close(ours, strength * (upper @ lower))
        found += 1
    assert found >= 2


@torch.inference_mode()
def velocity(model, channels):
    """What the model answers to random inputs of its own sizes."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    places = torch.cartesian_prod(torch.tensor([0.0]), torch.arange(4.0), torch.arange(4.0))
    return model(
        hidden_states=random(1, 16, 128)[..., :channels],
        encoder_hidden_states=random(1, 6, model.config.joint_attention_dim),
        pooled_projections=random(1, model.config.pooled_projection_dim),
        timestep=torch.tensor([0.5]),
        guidance=torch.tensor([3.5]),
        img_ids=places,
        txt_ids=torch.zeros(6, 3),
    ).sample


def embedded_transformer():
    return FluxTransformer2DModel.from_pretrained(model_folder() / "transformer", torch_dtype=torch.float32).eval()


def ours_with(adapter):
    model = embedded_transformer().requires_grad_(False)
    quantize(model, "fp32")
    attach(model, adapter, "adapter")
    return model


def test_diffusers_loads_the_pencil_file_and_does_the_same(bundled_adapters, pipeline):
    reference = pipeline(embedded_transformer())
    plain = velocity(reference.transformer, 64)
    path = adapter_paths()["pencil"]
    reference.load_lora_weights(str(path.parent), weight_name=path.name)
    expected = velocity(reference.transformer, 64)
    assert (expected - plain).abs().max() > 0.05
    torch.testing.assert_close(velocity(ours_with(bundled_adapters["pencil"]), 64), expected, **CLOSE)


def test_diffusers_does_the_same_with_the_control_lora(bundled_adapters, control_pipeline, tmp_path):
    """Written in diffusers' spelling first: its conversion of BFL's knows FLUX.1-dev's own width only."""
    write_adapter(bundled_adapters["edges"], tmp_path / "edges.safetensors", "diffusers")
    reference = control_pipeline(embedded_transformer())
    reference.load_lora_weights(str(tmp_path), weight_name="edges.safetensors")
    expected = velocity(reference.transformer, 128)
    torch.testing.assert_close(velocity(ours_with(bundled_adapters["edges"]), 128), expected, **CLOSE)


# effects


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_each_shows_in_pictures_and_goes_without_a_trace(storage, bundled_adapters):
    captions = held_out_captions(len(SEEDS))
    maps = edge_map(render(pack_scenes([one.scene for one in captions]), SIDE))
    pipe = gossamer.load(storage=storage)
    settings = BatchSettings(batch=len(SEEDS), steps=4)

    def paint(control=None):
        return paint_batches(pipe.components, [one.text for one in captions], SEEDS, settings, control)

    plain = paint()
    for style in STYLES:
        pipe.attach(style)
        styled = paint()
        pipe.detach(style)
        assert style_score(styled, style).mean() > style_score(plain, style).mean() + 0.3
    pipe.attach("edges")
    guided = paint(maps)
    pipe.detach("edges")
    assert edge_agreement(guided, maps).mean() > edge_agreement(plain, maps).mean() + 0.2
    assert torch.equal(paint(), plain)


def test_text_encoder_terms_act_through_the_pipeline(tmp_path):
    """A file with terms for T5 alone: the picture changes, and comes back bit for bit."""
    pipe = gossamer.load(storage="nf4")
    torch.manual_seed(0)
    width = pipe.components["text_encoder_2"].config.d_model
    name = "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"
    factors = {"lora_A": torch.randn(2, width), "lora_B": torch.randn(width, 2)}
    path = tmp_path / "words.safetensors"
    save_file({f"{name}.{kind}.weight": tensor for kind, tensor in factors.items()}, path)
    options = {"prompt": "a red ball", "seed": 1, "steps": 2}
    before = np.asarray(pipe(**options))
    attached = pipe.attach(str(path))
    assert not np.array_equal(np.asarray(pipe(**options)), before)
    pipe.set_scale(attached, 0.0)
    assert np.array_equal(np.asarray(pipe(**options)), before)
    pipe.detach(attached)
    assert np.array_equal(np.asarray(pipe(**options)), before)
