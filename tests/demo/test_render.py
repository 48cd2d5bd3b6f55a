"""The renderer against what a scene says: where things are, in which colour, and the same by any route."""

from __future__ import annotations

import colorsys
import random
from dataclasses import replace

import pytest
import torch

from gossamer.demo import camera, march
from gossamer.demo.look import ALBEDOS, pack_scenes
from gossamer.demo.render import render, render_buffers
from gossamer.demo.scene import BACKDROPS, COLOURS, LIGHTS, MATERIALS, SHAPES, Scene, Solid, sample_scene
from gossamer.demo.solids import distance, distance_and_normal

SIZE = 96


def scenes(count, start=0):
    return [sample_scene(random.Random(seed)) for seed in range(start, start + count)]


def lone(shape="sphere", colour="red", material="matte", backdrop="grey", light="left", **where):
    place = {"size": "large", "x": 0.1, "z": -0.2, **where}
    return Scene((Solid(shape, colour, material, **place),), (), backdrop, light)


def mask_of(scene, size=SIZE):
    return render_buffers(pack_scenes([scene]), size).seen.solid[0, 0] > 0


def test_the_same_batch_gives_the_same_bytes():
    batch = pack_scenes(scenes(2))
    assert torch.equal(render(batch, SIZE), render(batch, SIZE))


def test_a_batch_equals_its_scenes_one_by_one():
    several = scenes(6)
    assert {len(scene.solids) for scene in several} == {1, 2, 3}
    together = render(pack_scenes(several), SIZE, chunk=6)
    alone = torch.cat([render(pack_scenes([scene]), SIZE) for scene in several])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)


def test_chunks_do_not_matter():
    batch = pack_scenes(scenes(4, 10))
    torch.testing.assert_close(render(batch, 64, chunk=3), render(batch, 64, chunk=1), atol=2e-5, rtol=0)


def test_marching_the_pairs_that_matter_equals_marching_all(monkeypatch):
    batch = pack_scenes(scenes(8, 20))
    few = render(batch, 64, chunk=8)
    monkeypatch.setattr(march, "sparse", lambda mask: False)
    every = render(batch, 64, chunk=8)
    assert (few - every).abs().amax() < 1e-3
    assert (few - every).abs().mean() < 1e-6


def test_compile_is_given_every_step():
    seen = []

    def remember(function):
        seen.append(function.__name__)
        return function

    render(pack_scenes([lone()]), 16, compile=remember)
    assert {"advance", "narrow", "closure", "shade", "tone"} <= set(seen)


@pytest.mark.parametrize("shape", SHAPES)
def test_extents_are_those_of_the_scene(shape):
    solid = Solid(shape, "red", "matte", "medium", 0.3, -0.4, base=0.2, turn=0.0)
    planes = pack_scenes([Scene((solid,), (), "grey", "left")]).solids
    around, low, high = solid.radius, solid.base, solid.base + solid.height
    ys = torch.linspace(low - 0.2, high + 0.2, 241)
    across = torch.linspace(-around - 0.2, around + 0.2, 201)
    y, x, z = torch.meshgrid(ys, across, across, indexing="ij")
    inside = distance((0.3 + x.reshape(1, 1, -1), y.reshape(1, 1, -1), -0.4 + z.reshape(1, 1, -1)), planes) < 0
    inside = inside.reshape(x.shape)
    assert ys[inside.any(2).any(1)].min().item() == pytest.approx(low, abs=0.006)
    assert ys[inside.any(2).any(1)].max().item() == pytest.approx(high, abs=0.006)
    assert across[inside.any(0).any(1)].max().item() == pytest.approx(around, abs=0.008)
    assert across[inside.any(0).any(0)].min().item() == pytest.approx(-around, abs=0.008)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_normal_is_the_gradient_of_the_distance(shape):
    planes = pack_scenes([lone(shape, turn=0.4)]).solids._replace()
    planes = type(planes)(*(plane.double() for plane in planes))
    generator = torch.Generator().manual_seed(3)
    cloud = torch.randn(3, 1, 1, 400, generator=generator, dtype=torch.float64) * 0.7
    point = [(cloud[0] + 0.1).requires_grad_(), (cloud[1] + 0.6).requires_grad_(), (cloud[2] - 0.2).requires_grad_()]
    gap = distance(tuple(point), planes)
    slope = torch.autograd.grad(gap.sum(), point)
    _, normal = distance_and_normal(tuple(p.detach() for p in point), planes)
    outside = (gap > 1e-3).detach()
    for one, other in zip(normal, slope, strict=True):
        torch.testing.assert_close(one[outside], other[outside], atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_mask_spans_the_projected_object(shape):
    solid = lone(shape, size="large").solids[0]
    mask = mask_of(Scene((solid,), (), "grey", "left"), 256)
    frame = camera.frame_of(256)
    left = min(camera.project(solid.x - solid.radius, y, solid.z, frame)[1] for y in (0.0, solid.height / 2))
    columns, rows = mask.any(0).nonzero().squeeze(1), mask.any(1).nonzero().squeeze(1)
    assert columns.min().item() == pytest.approx(left, abs=4 if shape != "cube" else 6)
    front = camera.project(solid.x, 0.0, solid.z + solid.radius, frame)[0]
    back = camera.project(solid.x, solid.height, solid.z - solid.radius, frame)[0]
    assert back - 3 <= rows.min().item() < rows.max().item() <= front + 3


def test_the_ring_has_a_hole_with_a_wall_of_its_own():
    buffers = render_buffers(pack_scenes([lone("ring", x=0.0, z=0.0)]), 256)
    row, column = camera.project(0.0, 0.34 * 0.6, 0.0, camera.frame_of(256))
    near_and_far = buffers.seen.depth[0, 0, int(row) - 12 : int(row) + 12, int(column)].diff()
    assert near_and_far.abs().amax() > 0.15  # from the near tube's top the view jumps to the far side of the hole


@pytest.mark.parametrize("size", ["small", "large"])
def test_everything_a_scene_may_hold_is_inside_the_frame(size):
    for scene in scenes(60, 300):
        inner = mask_of(replace(scene, solids=tuple(replace(solid, size=size) for solid in scene.solids[:1])), 48)
        assert inner.any()
        assert not torch.cat([inner[0], inner[-1], inner[:, 0], inner[:, -1]]).any()


def test_absent_solids_leave_no_trace():
    alone, crowded = lone(), sample_scene(random.Random(1), 3)
    batch = pack_scenes([alone, crowded])
    assert batch.present.tolist() == [[True, False, False], [True, True, True]]
    numbers = render_buffers(batch, SIZE).seen.solid.flatten(1)
    assert set(numbers[0].tolist()) == {0.0, 1.0}
    assert set(numbers[1].tolist()) == {0.0, 1.0, 2.0, 3.0}


def test_the_nearer_solid_hides_the_farther():
    front = Solid("cube", "red", "matte", "large", 0.0, 0.8)
    behind = Solid("sphere", "blue", "matte", "small", 0.0, -0.3)
    numbers = render_buffers(pack_scenes([Scene((behind, front), (), "grey", "left")]), SIZE).seen.solid
    row, column = camera.project(0.0, front.height / 2, front.z + front.radius, camera.frame_of(SIZE))
    assert numbers[0, 0, int(row), int(column)] == 2


def test_light_from_the_left_throws_the_shadow_to_the_right():
    pictures = {}
    for light in ("left", "right"):
        pictures[light] = render(pack_scenes([lone("cylinder", light=light, x=0.0, z=0.0)]), SIZE)[0].mean(0)
    row, right = camera.project(0.95, 0.0, -0.2, camera.frame_of(SIZE))
    _, left = camera.project(-0.95, 0.0, -0.2, camera.frame_of(SIZE))
    for light, dark, bright in (("left", right, left), ("right", left, right)):
        picture = pictures[light]
        assert picture[int(row), int(dark)] < 0.85 * picture[int(row), int(bright)]


def test_shadows_are_soft():
    scene = lone("sphere", x=-0.3, z=0.0)
    picture = render(pack_scenes([scene]), 256)[0].mean(0)
    row, column = camera.project(0.55, 0.0, -0.45, camera.frame_of(256))
    assert not mask_of(scene, 256)[int(row), int(column) :].any()
    across = picture[int(row), int(column) :]
    assert across.amax() - across.amin() > 0.1
    assert across.diff().abs().amax() < 0.05


def named(rgb):
    """The colour's name by hue, or white by lack of one."""
    hue, saturation, _ = colorsys.rgb_to_hsv(*rgb)
    if saturation < 0.25:
        return "white"
    hues = {name: colorsys.rgb_to_hsv(*albedo)[0] for name, albedo in ALBEDOS.items() if name != "white"}
    return min(hues, key=lambda name: min(abs(hue - hues[name]), 1 - abs(hue - hues[name])))


@pytest.mark.parametrize("light", LIGHTS)
def test_every_colour_keeps_its_name(light):
    looks = [(c, m, b) for c in COLOURS for m in MATERIALS for b in BACKDROPS]
    batch = pack_scenes([lone("sphere", c, m, b, light) for c, m, b in looks])
    buffers = render_buffers(batch, 32)
    mask = (buffers.seen.solid > 0).float()
    means = (buffers.picture * mask).sum((2, 3)) / mask.sum((2, 3))
    wrong = {look: named(mean) for look, mean in zip(looks, means.tolist(), strict=True) if named(mean) != look[0]}
    assert not wrong


def test_highlights_on_white_are_not_clipped():
    for material in MATERIALS:
        picture = render(pack_scenes([lone("sphere", "white", material, light="front")]), SIZE)
        assert (picture > 0.995).float().mean() < 1e-4
        assert picture.amin() >= 0


def test_the_floor_is_smooth():
    picture = render(pack_scenes([lone("sphere", x=0.0, z=0.0)]), 256)[0]
    corner = picture[:, 200:250, 10:80]
    assert corner.diff(dim=1).abs().amax() < 0.01
    assert corner.diff(dim=2).abs().amax() < 0.01
