"""Held-out captions and the shares that pictures of their scenes get."""

import pytest
import torch

from gossamer.bench.adherence import adherence, held_out_captions
from gossamer.demo.reader import load_reader
from gossamer.demo.render import pack_scenes, render
from gossamer.demo.scene import held_out


def test_captions_are_held_out_with_one_two_and_three_objects_in_turn():
    captions = held_out_captions(9)
    assert all(held_out(one.scene) for one in captions)
    assert [len(one.scene.solids) for one in captions] == [1, 2, 3] * 3


def test_a_shorter_list_is_the_beginning_of_a_longer_one():
    assert held_out_captions(4) == held_out_captions(9)[:4]
    assert held_out_captions(4, seed=1) != held_out_captions(4, seed=2)


def test_the_renderers_pictures_follow_their_captions_and_others_do_not():
    captions = held_out_captions(6)
    reader = load_reader()
    pictures = render(pack_scenes([one.scene for one in captions]), samples=1)
    right = adherence(captions, pictures, reader)
    shifted = adherence(captions, pictures.roll(1, 0), reader)
    empty = adherence(captions, torch.full_like(pictures, 0.5), reader)
    assert right["objects"] >= 80
    assert shifted["objects"] < 50
    assert (empty["objects"], empty["exact"], empty["extra"]) == (0.0, 0.0, 0)
    assert list(right["by_count"]) == [1, 2, 3]


def test_there_is_one_picture_for_each_caption():
    with pytest.raises(ValueError, match="argument"):
        adherence(held_out_captions(2), torch.zeros(1, 3, 256, 256), load_reader())
