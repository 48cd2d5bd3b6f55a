"""Styles and edge maps: measures that tell styles apart from pictures alone, and edges where a picture has them."""

from __future__ import annotations

import random

import pytest
import torch

from gossamer.demo.edges import edge_agreement, edge_map
from gossamer.demo.look import pack_scenes
from gossamer.demo.render import render
from gossamer.demo.scene import sample_scene
from gossamer.demo.styles import STYLES, render_styled, style_score
from gossamer.errors import UnknownOptionError


@pytest.fixture(scope="module")
def pictures():
    batch = pack_scenes([sample_scene(random.Random(seed)) for seed in range(24)])
    return {"plain": render(batch)} | {style: render_styled(batch, style) for style in STYLES}


@pytest.mark.parametrize("style", STYLES)
def test_a_style_scores_high_and_all_else_low(pictures, style):
    for name, drawn in pictures.items():
        score = style_score(drawn, style)
        assert score.shape == (24,)
        assert (score >= 0).all()
        assert (score <= 1).all()
        if name == style:
            assert score.mean() > 0.85
        else:
            assert score.mean() < 0.15


@pytest.mark.parametrize("style", STYLES)
def test_blank_and_noisy_pictures_are_in_no_style(style):
    blank = torch.stack([torch.full((3, 64, 64), value) for value in (0.0, 0.5, 0.95)])
    noise = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert style_score(torch.cat([blank, noise]), style).amax() == 0


def test_styled_pictures_are_pure_functions(pictures):
    batch = pack_scenes([sample_scene(random.Random(3))])
    for style in STYLES:
        torch.testing.assert_close(render_styled(batch, style)[0], pictures[style][3], atol=2e-5, rtol=0)


def test_styles_keep_the_colours_apart(pictures):
    for style in STYLES:
        drawn = pictures[style]
        assert drawn.shape == (24, 3, 256, 256)
        assert 0 <= drawn.amin() <= drawn.amax() <= 1
        assert (drawn.amax(1) - drawn.amin(1)).flatten(1).amax(1).gt(0.25).float().mean() > 0.8


def test_an_unknown_style_is_an_error():
    with pytest.raises(UnknownOptionError, match="crayon"):
        render_styled(pack_scenes([sample_scene(random.Random(0))]), "crayon")
    with pytest.raises(UnknownOptionError, match="crayon"):
        style_score(torch.zeros(1, 3, 8, 8), "crayon")


def test_the_edge_of_a_step_is_one_pixel_wide_and_in_place():
    picture = torch.zeros(1, 3, 40, 60)
    picture[..., 30:] = 1.0
    edges = edge_map(picture)
    assert edges.shape == picture.shape
    assert set(edges.unique().tolist()) == {0.0, 1.0}
    assert edges.sum(3).eq(1).all()
    assert edges[0, 0].nonzero()[:, 1].float().sub(29.5).abs().max() <= 0.5


@pytest.mark.parametrize(("turn", "across"), [(0, 3), (1, 2)])
def test_edges_turn_with_the_picture(turn, across):
    picture = torch.zeros(1, 3, 48, 48)
    picture[..., 20:] = 0.8
    edges = edge_map(torch.rot90(picture, turn, (2, 3)))
    assert edges.sum(across).eq(1).all()


def test_edges_of_a_square_close_and_colours_of_one_brightness_part():
    picture = torch.full((1, 3, 64, 64), 0.5)
    picture[:, 0, 16:48, 16:48], picture[:, 2, 16:48, 16:48] = 0.7, 0.2
    edges = edge_map(picture)[0, 0]
    assert 100 <= edges.sum() <= 132  # a closed line around 32 x 32 pixels, its corners cut
    assert edges[20:44, 20:44].sum() == 0
    assert edges[:12].sum() + edges[52:].sum() == 0


def test_flat_pictures_and_gentle_slopes_have_no_edges():
    slope = torch.linspace(0.2, 0.8, 128).expand(1, 3, 128, 128)
    assert edge_map(torch.full((1, 3, 32, 32), 0.4)).sum() == 0
    assert edge_map(slope).sum() == 0


def test_weak_edges_stay_only_beside_strong_ones():
    faint = torch.full((1, 3, 40, 40), 0.5)
    faint[..., 20:] = 0.6
    assert edge_map(faint).sum() == 0
    growing = torch.full((1, 3, 40, 40), 0.5)
    growing[..., 20:] += torch.linspace(0.1, 0.5, 40)[:, None]
    assert edge_map(growing)[0, 0, 1:8].sum() == 7


def test_agreement_is_whole_for_the_own_edges_and_forgives_two_pixels(pictures):
    drawn = pictures["plain"][:8]
    edges = edge_map(drawn)
    assert edge_agreement(drawn, edges).eq(1).all()
    assert edge_agreement(drawn, edges.roll(2, dims=3)).min() > 0.95
    assert edge_agreement(drawn, edges.roll(1, dims=0)).mean() < 0.5
    assert edge_agreement(drawn, torch.zeros_like(edges)).eq(0).all()


def test_two_pictures_without_edges_agree():
    flat = torch.full((2, 3, 32, 32), 0.3)
    assert edge_agreement(flat, torch.zeros_like(flat)).eq(1).all()
