"""A group of linears in one buffer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer.formats import pack
from gossamer.layers import LowRank, QuantLinear
from gossamer.models.flux.together import apply_together


@pytest.fixture
def layers():
    """A plain linear, one without bias, a packed one and a packed one with an adapter; 7, 3, 5 and 4 outputs."""
    torch.manual_seed(0)
    adapted = QuantLinear(pack(torch.randn(4, 64), "nf4"), torch.randn(4))
    adapted.add(LowRank("style", torch.randn(2, 64), torch.randn(4, 2), 0.5))
    packed = QuantLinear(pack(torch.randn(5, 64), "int8"))
    return [nn.Linear(64, 7), nn.Linear(64, 3, bias=False), packed, adapted]


@torch.inference_mode()
def test_every_layer_has_its_columns(layers):
    x = torch.randn(2, 6, 64)
    expected = torch.cat([layer(x) for layer in layers], dim=-1)
    out = torch.empty(2, 6, 19)
    assert apply_together(layers, x, out) is out
    assert torch.equal(out, expected)


@torch.inference_mode()
def test_a_view_is_written_and_nothing_besides(layers):
    x = torch.randn(2, 6, 64)
    buffer = torch.full((2, 10, 19), torch.nan)
    apply_together(layers, x, buffer[:, 3:9])
    assert torch.equal(buffer[:, 3:9], apply_together(layers, x, torch.empty(2, 6, 19)))
    assert buffer[:, :3].isnan().all()
    assert buffer[:, 9:].isnan().all()


def test_a_buffer_of_another_width_is_refused(layers):
    with pytest.raises(ValueError, match="20 columns"):
        apply_together(layers, torch.randn(1, 2, 64), torch.empty(1, 2, 20))
