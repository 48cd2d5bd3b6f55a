"""Decoding in strips: the picture of the whole decode, at any size."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL

from gossamer.demo.embedded import model_folder
from gossamer.errors import WrongModelError
from gossamer.memory.offload_strips import StripDecoder


@pytest.fixture(scope="module")
def vae(one_thread):
    return AutoencoderKL.from_pretrained(model_folder() / "vae").eval()


def decoded(vae, latents, positions=None):
    whole = vae.decoder
    if positions is not None:
        vae.decoder = StripDecoder.of(whole, positions)
    try:
        with torch.no_grad():
            return vae.decode(latents).sample
    finally:
        vae.decoder = whole


@pytest.mark.parametrize("shape", [(1, 16, 16), (2, 9, 13), (1, 1, 1), (1, 3, 24), (1, 24, 7)])
@pytest.mark.parametrize("positions", [1, 777, 1 << 15])
def test_strips_are_the_whole(vae, shape, positions):
    batch, height, width = shape
    latents = torch.randn(batch, 16, height, width, generator=torch.Generator().manual_seed(height))
    torch.testing.assert_close(decoded(vae, latents, positions), decoded(vae, latents), rtol=0, atol=1e-4)


def test_blended_tiles_are_not(vae):
    """Why diffusers' own tiling does not do: each tile has group norms and attention of its own."""
    latents = torch.randn(1, 16, 40, 8, generator=torch.Generator().manual_seed(0))
    expected = decoded(vae, latents)
    vae.enable_tiling()
    try:
        tiled = decoded(vae, latents)
    finally:
        vae.disable_tiling()
    assert (tiled - expected).abs().max() > 0.05
    assert (decoded(vae, latents, 2048) - expected).abs().max() < 1e-4


def test_in_bfloat16_it_is_as_near_as_the_whole(vae):
    latents = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = decoded(vae, latents)
    half = AutoencoderKL.from_pretrained(model_folder() / "vae", torch_dtype=torch.bfloat16).eval()
    errors = [
        (decoded(half, latents.bfloat16(), positions).float() - expected).norm() / expected.norm()
        for positions in (None, 500)
    ]
    assert errors[1] < 1.5 * errors[0]


def test_names_of_weights_stay(vae):
    names = list(vae.state_dict())
    whole = vae.decoder
    vae.decoder = StripDecoder.of(whole)
    assert list(vae.state_dict()) == names
    assert vae.decoder.whole() is whole
    vae.decoder = whole


def test_only_two_maps_are_kept(vae):
    """The largest that a layer makes is a strip; whole maps are the input and the output of a residual block."""
    sizes = []

    def note(module, args, out):
        sizes.append(out.shape[2])

    latents = torch.zeros(1, 16, 64, 8)
    convs = [part for part in vae.decoder.modules() if isinstance(part, torch.nn.Conv2d)]
    handles = [conv.register_forward_hook(note) for conv in convs]
    decoded(vae, latents, 1)
    for handle in handles:
        handle.remove()
    assert set(sizes) == {2}, "shortcuts are the convolutions that are called as modules"


@pytest.mark.parametrize("change", ["upsample", "norm", "activation"])
def test_an_unknown_layer_is_refused(vae, change):
    import copy

    decoder = copy.deepcopy(vae.decoder)
    if change == "upsample":
        decoder.up_blocks[0].upsamplers[0].interpolate = False
    elif change == "norm":
        decoder.conv_norm_out = torch.nn.BatchNorm2d(32)
    else:
        decoder.mid_block.resnets[0].nonlinearity = torch.nn.GELU()
    with pytest.raises(WrongModelError, match="cannot be decoded in strips"):
        StripDecoder.of(decoder)
