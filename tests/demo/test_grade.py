"""Grades: a perfect reading earns everything, each fault costs what it should, twins are matched in the kindest way."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.demo.grade import Grade, grade, summarize
from gossamer.demo.reader import Reading, SeenSolid
from gossamer.demo.scene import COLOURS, SHAPES, Link, Scene, Solid, sample_scene

scenes = st.integers(0, 10**6).map(lambda seed: sample_scene(random.Random(seed)))
seen_solids = st.builds(
    SeenSolid,
    shape=st.sampled_from(SHAPES),
    colour=st.sampled_from(COLOURS),
    x=st.floats(-1.6, 1.6),
    z=st.floats(-1.1, 1.1),
    base=st.floats(0, 1.2),
    confidence=st.floats(0, 1),
)


def seen(solid: Solid) -> SeenSolid:
    place = solid.x, solid.z, solid.base
    return SeenSolid(solid.shape, solid.colour, *place, confidence=0.9, size=solid.size, material=solid.material)


def perfect(scene: Scene) -> Reading:
    return Reading(tuple(seen(solid) for solid in scene.solids))


def ball(colour: str, x: float) -> Solid:
    return Solid("sphere", colour, "matte", "small", x, 0.0)


@given(scenes, st.randoms())
def test_a_perfect_reading_in_any_order_is_exact(scene, rng):
    objects = list(perfect(scene).objects)
    rng.shuffle(objects)
    result = grade(scene, Reading(tuple(objects)))
    count = len(scene.solids)
    assert result == Grade(objects_right=count, objects=count, relations_right=count - 1, relations=count - 1, extra=0)
    assert result.exact


@given(scenes, st.data())
def test_a_missed_object_takes_its_relations_with_it(scene, data):
    missed = data.draw(st.integers(0, len(scene.solids) - 1))
    objects = [one for index, one in enumerate(perfect(scene).objects) if index != missed]
    result = grade(scene, Reading(tuple(objects)))
    untouched = [link for link in scene.links if missed not in (link.subject, link.object)]
    assert result.objects_right == len(scene.solids) - 1
    assert result.relations_right == len(untouched)
    assert result.extra == 0
    assert not result.exact


@given(scenes, st.data(), st.sampled_from(["shape", "colour"]))
def test_a_wrong_look_is_one_object_wrong_and_one_extra(scene, data, look):
    place = data.draw(st.integers(0, len(scene.solids) - 1))
    objects = list(perfect(scene).objects)
    kinds = {(solid.shape, solid.colour) for solid in scene.solids}
    others = [replace(objects[place], **{look: name}) for name in (SHAPES if look == "shape" else COLOURS)]
    objects[place] = next(other for other in others if (other.shape, other.colour) not in kinds)
    result = grade(scene, Reading(tuple(objects)))
    assert (result.objects_right, result.extra, result.exact) == (len(scene.solids) - 1, 1, False)


@given(scenes, seen_solids)
def test_an_object_too_many_costs_exactness_only(scene, stranger):
    objects = (*perfect(scene).objects, stranger)
    result = grade(scene, Reading(objects))
    assert (result.objects_right, result.relations_right) == (len(scene.solids), len(scene.links))
    assert result.extra == 1
    assert not result.exact


@given(scenes, st.lists(seen_solids, max_size=6))
def test_no_reading_earns_more_than_there_is(scene, objects):
    result = grade(scene, Reading(tuple(objects)))
    assert 0 <= result.objects_right <= min(len(scene.solids), len(objects))
    assert result.objects_right + result.extra == len(objects)
    assert 0 <= result.relations_right <= len(scene.links)
    assert result.exact == (
        result.objects_right == len(scene.solids) and result.relations_right == len(scene.links) and result.extra == 0
    )


def test_swapped_places_leave_objects_right_and_the_relation_wrong():
    scene = Scene((ball("red", -0.6), ball("blue", 0.6)), (Link(0, "left of", 1),), "grey", "left")
    swapped = Reading((seen(ball("red", 0.6)), seen(ball("blue", -0.6))))
    assert grade(scene, swapped) == Grade(2, 2, 0, 1, 0)


def test_on_top_is_not_beside():
    cube = Solid("cube", "red", "matte", "large", 0.0, 0.0)
    ring = Solid("ring", "blue", "matte", "small", 0.0, 0.0, base=1.08)
    scene = Scene((cube, ring), (Link(1, "on top of", 0),), "grey", "left")
    assert grade(scene, perfect(scene)).exact
    fallen = Reading((seen(cube), seen(replace(ring, x=0.9, base=0.0))))
    assert grade(scene, fallen) == Grade(2, 2, 0, 1, 0)


def test_twins_are_counted_once_each():
    scene = Scene((ball("red", -0.6), ball("red", 0.6)), (), "grey", "left")
    assert grade(scene, Reading((seen(ball("red", 0.0)),))) == Grade(1, 2, 0, 0, 0)
    triplets = Reading(tuple(seen(ball("red", x)) for x in (-1.0, 0.0, 1.0)))
    assert grade(scene, triplets) == Grade(2, 2, 0, 0, 1)


def test_of_two_alike_the_one_in_the_asked_place_counts():
    scene = Scene((ball("red", -0.8), ball("blue", 0.0)), (Link(0, "left of", 1),), "grey", "left")
    reading = Reading((seen(ball("red", 0.9)), seen(ball("blue", 0.0)), seen(ball("red", -0.9))))
    assert grade(scene, reading) == Grade(2, 2, 1, 1, 1)


def test_an_empty_picture_earns_nothing():
    scene = sample_scene(random.Random(3), 3)
    assert grade(scene, Reading(())) == Grade(0, 3, 0, 2, 0)


def test_summary_counts_objects_relations_and_pictures():
    summary = summarize([Grade(1, 1, 0, 0, 0), Grade(2, 2, 1, 1, 0), Grade(1, 2, 0, 1, 3), Grade(3, 3, 1, 2, 0)])
    assert summary["pictures"] == 4
    assert summary["objects"] == pytest.approx(100 * 7 / 8)
    assert summary["relations"] == pytest.approx(50)
    assert summary["exact"] == pytest.approx(50)
    assert summary["extra"] == 3
    assert list(summary["by_count"]) == [1, 2, 3]
    assert summary["by_count"][2] == {"pictures": 2, "objects": 75.0, "relations": 50.0, "exact": 50.0, "extra": 3}
    assert summary["by_count"][1]["relations"] is None


def test_a_summary_of_nothing_claims_nothing():
    assert summarize([]) == {
        "pictures": 0,
        "objects": None,
        "relations": None,
        "exact": None,
        "extra": 0,
        "by_count": {},
    }
