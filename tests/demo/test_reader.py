"""The scene reader: decoding of painted network outputs, its file, its input, how right it is on rendered scenes."""

from __future__ import annotations

import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from gossamer.demo.grade import grade, summarize
from gossamer.demo.reader import WEIGHTS, Reading, decode, load_reader, read_pictures
from gossamer.demo.reader_net import GRID, SPLIT, ReaderNet
from gossamer.demo.render import pack_scenes, render
from gossamer.demo.scene import COLOURS, MATERIALS, RADIUS, SHAPES, Solid, sample_split
from gossamer.errors import FileDamagedError, FileMissingError, InvalidOptionError

PICTURES = 60


def blank() -> torch.Tensor:
    """The output for a picture without objects."""
    output = torch.zeros(1, sum(SPLIT), GRID, GRID)
    output[:, : len(SHAPES)] = -8.0
    return output


def paint(output: torch.Tensor, solid: Solid, cell: tuple[int, int], heat: float = 3.0) -> None:
    """Write an object into picture 0 of an output, with a slope of heat around its centre cell."""
    row, column = cell
    lines = torch.arange(GRID)
    away = (lines[:, None] - row).abs() + (lines - column).abs()
    channel = output[0, SHAPES.index(solid.shape)]
    channel.copy_(torch.maximum(channel, heat - 1.5 * away))
    looks = (
        (COLOURS, solid.colour),
        (tuple(RADIUS), solid.size),
        (MATERIALS, solid.material),
    )
    first = len(SHAPES)
    for names, name in looks:
        output[0, first + names.index(name), row, column] = 6.0
        first += len(names)
    output[0, first:, row, column] = torch.tensor([solid.x, solid.z, solid.base])


CUBE = Solid("cube", "teal", "metal", "large", -0.5, 0.25)
RING = Solid("ring", "white", "glossy", "small", -0.5, 0.25, 1.08)


def kinds(reading: Reading) -> list[tuple[str, str]]:
    return [(seen.shape, seen.colour) for seen in reading.objects]


def test_a_picture_without_peaks_shows_nothing():
    assert decode(blank()) == [Reading(())]


def test_every_attribute_is_decoded():
    output = blank()
    paint(output, CUBE, (30, 20))
    (seen,) = decode(output)[0].objects
    assert seen.solid == CUBE
    chance = torch.sigmoid(torch.tensor(3.0)) * torch.eye(8)[0].mul(6.0).softmax(0)[0]
    assert seen.confidence == pytest.approx(float(chance))


def test_objects_come_surest_first_and_keep_their_pictures():
    output = torch.cat([blank(), blank()])
    paint(output, CUBE, (30, 20), heat=1.0)
    paint(output, RING, (20, 20), heat=4.0)
    first, second = decode(output)
    assert kinds(first) == [("ring", "white"), ("cube", "teal")]
    assert second == Reading(())
    assert first.relation(0, 1) == "on top of"


def test_a_faint_peak_is_no_object():
    output = blank()
    paint(output, CUBE, (30, 20), heat=-0.5)  # sigmoid 0.38
    assert decode(output)[0] == Reading(())
    assert len(decode(output, threshold=0.3)[0].objects) == 1


def test_shapes_compete_for_a_centre():
    output = blank()
    paint(output, CUBE, (30, 20), heat=2.0)
    output[0, SHAPES.index("cylinder"), 30, 20] = 2.5
    assert [seen.shape for seen in decode(output)[0].objects] == ["cylinder"]


def test_two_peaks_side_by_side_are_one_object_seen_twice():
    output = blank()
    paint(output, CUBE, (30, 20), heat=3.0)
    output[0, SHAPES.index("cone"), 30, 22] = 2.5
    assert [seen.shape for seen in decode(output)[0].objects] == ["cube"]


def test_equal_heat_all_over_is_not_an_object_in_every_cell():
    output = blank()
    output[0, 0, 30:32, 20:22] = 3.0
    assert len(decode(output)[0].objects) == 1


def test_an_object_at_the_border_is_found():
    output = blank()
    paint(output, CUBE, (0, GRID - 1))
    assert kinds(decode(output)[0]) == [("cube", "teal")]


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(FileMissingError, match="nowhere"):
        load_reader(tmp_path / "nowhere.safetensors")


def test_truncated_weights_are_refused(tmp_path):
    path = tmp_path / "reader.safetensors"
    save_file(ReaderNet().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FileDamagedError, match="cannot be used"):
        load_reader(path)


def test_weights_of_something_else_are_refused(tmp_path):
    path = tmp_path / "reader.safetensors"
    save_file({**ReaderNet().state_dict(), "more": torch.zeros(1)}, path)
    with pytest.raises(FileDamagedError, match="more"):
        load_reader(path)


@pytest.mark.parametrize(
    "pictures",
    [torch.zeros(3, 256, 256), torch.zeros(1, 4, 256, 256), torch.zeros(1, 3, 256, 256, dtype=torch.uint8)],
    ids=["no batch", "four channels", "bytes"],
)
def test_what_is_no_batch_of_float_pictures_is_refused(pictures):
    with pytest.raises(InvalidOptionError, match="not pictures"):
        read_pictures(pictures, ReaderNet())


def test_pictures_that_are_not_square_are_refused():
    with pytest.raises(InvalidOptionError, match="320 wide and 256 high"):
        read_pictures(torch.zeros(1, 3, 256, 320), ReaderNet())


@pytest.fixture(scope="module")
def rendered():
    """Scenes, half of them of held-out combinations, and their pictures."""
    rng = random.Random("reader test")
    scenes = [sample_split(rng, held=index % 2 == 0) for index in range(PICTURES)]
    return scenes, render(pack_scenes(scenes, torch.device("cpu")), samples=1)


def test_the_stored_reader_is_small():
    tensors = load_file(WEIGHTS)
    assert sum(tensor.numel() for tensor in tensors.values()) <= 450_000
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert WEIGHTS.stat().st_size <= 950_000


def test_the_stored_reader_is_right_on_rendered_scenes(rendered):
    scenes, pictures = rendered
    summary = summarize([grade(scene, seen) for scene, seen in zip(scenes, read_pictures(pictures), strict=True)])
    assert summary["objects"] >= 99
    assert summary["relations"] >= 99
    assert summary["exact"] >= 98  # one picture of sixty


def test_places_are_close(rendered):
    scenes, pictures = rendered
    errors = []
    for scene, reading in zip(scenes, read_pictures(pictures), strict=True):
        true = {(solid.shape, solid.colour): solid for solid in scene.solids}
        for seen in reading.objects:
            if (solid := true.get((seen.shape, seen.colour))) is not None:
                errors.append([seen.x - solid.x, seen.z - solid.z, seen.base - solid.base])
    assert torch.tensor(errors).abs().mean() < 0.05  # world units; an object is about one wide


@pytest.mark.parametrize("size", [192, 512])
def test_pictures_of_another_size_read_the_same(rendered, size):
    scenes, pictures = rendered[0][:12], rendered[1][:12]
    resized = torch.nn.functional.interpolate(pictures, (size, size), mode="bilinear", antialias=True).clamp(0, 1)
    summary = summarize([grade(scene, seen) for scene, seen in zip(scenes, read_pictures(resized), strict=True)])
    assert summary["objects"] == 100


def test_a_blur_without_shapes_is_not_read_as_objects(rendered):
    small = torch.nn.functional.interpolate(rendered[1][:12], (12, 12), mode="area")
    blurred = torch.nn.functional.interpolate(small, (256, 256), mode="bicubic").clamp(0, 1)
    assert sum(len(reading.objects) for reading in read_pictures(blurred)) <= 1


def test_reading_is_repeatable_and_does_not_depend_on_company(rendered):
    pictures = rendered[1][:3]
    together, alone = read_pictures(pictures), [read_pictures(picture[None])[0] for picture in pictures]
    assert together == read_pictures(pictures)
    assert [kinds(reading) for reading in together] == [kinds(reading) for reading in alone]
