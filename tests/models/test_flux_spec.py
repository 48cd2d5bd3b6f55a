"""The table of names and sizes against diffusers' own model, built without memory on the meta device."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch
from diffusers import FluxTransformer2DModel

from gossamer.errors import WrongModelError
from gossamer.models.flux_spec import SENSITIVE, FluxSpec, linear_shapes, norm_shapes

DEV = {"guidance_embeds": True}
SCHNELL = {"guidance_embeds": False}
FILL = {"guidance_embeds": True, "in_channels": 384, "out_channels": 64}
TINY = {
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 3,
    "joint_attention_dim": 48,
    "pooled_projection_dim": 40,
    "axes_dims_rope": (8, 12, 12),
    "in_channels": 16,
    "patch_size": 2,
}


@pytest.fixture(params=[DEV, SCHNELL, FILL, TINY], ids=["dev", "schnell", "fill", "tiny"])
def model(request):
    with torch.device("meta"):
        return FluxTransformer2DModel(**request.param)


def test_every_linear_and_no_other(model):
    linears = {name: child for name, child in model.named_modules() if isinstance(child, torch.nn.Linear)}
    expected = {name: (child.out_features, child.in_features) for name, child in linears.items()}
    assert linear_shapes(FluxSpec.from_config(model.config)) == expected


def test_every_norm_scale_and_no_other(model):
    linears = {f"{name}.weight" for name in linear_shapes(FluxSpec.from_config(model.config))}
    others = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if name not in linears and name.endswith(".weight")
    }
    assert norm_shapes(FluxSpec.from_config(model.config)) == others


def test_sensitive_patterns_name_the_linears_outside_the_blocks(model):
    names = linear_shapes(FluxSpec.from_config(model.config))
    outside = {name for name in names if "transformer_blocks" not in name}
    assert {name for name in names if any(fnmatchcase(name, pattern) for pattern in SENSITIVE)} == outside
    assert all(any(fnmatchcase(name, pattern) for name in names) for pattern in SENSITIVE)


def test_dev_has_the_known_number_of_linears():
    assert len(linear_shapes(FluxSpec(19, 38, 24, 128, 64, 64, 4096, 768, True))) == 504


def test_a_config_of_another_model():
    with pytest.raises(WrongModelError, match="pooled_projection_dim") as caught:
        FluxSpec.from_config({"num_layers": 8, "num_single_layers": 48})
    assert caught.value.next_step
