import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

import gossamer
from gossamer.adapters import read_adapter, write_adapter
from gossamer.errors import FileDamagedError, FileMissingError, InvalidOptionError, NotReproducibleError, OutputError
from gossamer.pipeline.options import PaintOptions, RunOptions
from gossamer.pipeline.outputs import Job, divide, plan_jobs, read_prompts, slug
from gossamer.pipeline.parse import Size
from gossamer.pipeline.picture import parameters_text, pixels_sha256, read_picture, save
from gossamer.pipeline.recipe import AdapterUse, ModelUse, Recipe, from_json, to_json
from gossamer.pipeline.rerun import prepare_rerun

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "a teal ring, “shiny”\nin front of a wall: 球"
SMALL = Size(64, 64)


@pytest.fixture(scope="module")
def painting(pipe):
    return pipe.paint(PaintOptions(PROMPT, seed=5, steps=2, size=SMALL))


@pytest.fixture
def file(painting, tmp_path):
    return save(painting.image, tmp_path / "new folder" / "picture.png")


def test_both_chunks_survive_the_file(painting, file):
    with Image.open(file) as picture:
        text = picture.info["parameters"]
        record = json.loads(picture.info["gossamer"])
    prompt, _, settings = text.rpartition("\n")
    assert prompt == PROMPT
    assert settings.startswith(
        "Steps: 2, Sampler: Euler flow match, CFG scale: 3.5, Seed: 5, Size: 64x64, Model hash: "
    )
    assert settings.endswith("Model: embedded, Version: gossamer 0.1.0")
    assert from_json(json.loads(json.dumps(to_json(painting.recipe))), "test") == painting.recipe
    assert set(record) == {"recipe", "versions", "device", "threads", "pixels_sha256"}
    assert set(record["versions"]) == {"gossamer", "torch", "diffusers", "transformers"}


def test_the_pixels_survive_the_file(painting, file):
    record = read_picture(file)
    assert record.recipe == painting.recipe
    assert record.pixels_sha256 == pixels_sha256(record.image) == painting.pixels_sha256


def test_nothing_but_the_picture_is_left(file):
    assert [path.name for path in file.parent.iterdir()] == ["picture.png"]


def test_a_failed_write_leaves_nothing(painting, tmp_path, monkeypatch):
    def fail(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OutputError, match="cannot be written") as caught:
        save(painting.image, tmp_path / "picture.png")
    assert "No space left" in caught.value.why
    assert list(tmp_path.iterdir()) == []


def test_adapters_are_named_with_their_hashes(painting):
    adapters = (AdapterUse("pencil", "pencil", 0.5, "ab" * 32), AdapterUse("ink", "x/ink.safetensors", 1.0, "cd" * 32))
    recipe = dataclasses.replace(painting.recipe, adapters=adapters, model=ModelUse("C:\\flux, mine", None))
    text = parameters_text(recipe)
    assert 'Lora hashes: "pencil: ababababab, ink: cdcdcdcdcd", Version' in text
    assert 'Model: "C:\\\\flux, mine", ' in text
    assert "Model hash" not in text


@pytest.mark.parametrize(
    "change",
    [
        lambda recipe: recipe.pop("seed"),
        lambda recipe: recipe.update(extra=1),
        lambda recipe: recipe.update(seed="0"),
        lambda recipe: recipe.update(steps=True),
        lambda recipe: recipe.update(model=None),
        lambda recipe: recipe.update(adapters={}),
        lambda recipe: recipe.update(adapters=[{"name": "x"}]),
        lambda recipe: recipe.update(control=[]),
        lambda recipe: recipe.update(prompt=None),
    ],
)
def test_settings_from_outside_are_checked(painting, change):
    content = json.loads(json.dumps(to_json(painting.recipe)))
    change(content)
    with pytest.raises(FileDamagedError, match="cannot be read"):
        from_json(content, "picture.png")


def test_pictures_that_are_not_ours(tmp_path):
    with pytest.raises(FileMissingError):
        read_picture(tmp_path / "none.png")
    plain = tmp_path / "plain.png"
    Image.new("RGB", (16, 16)).save(plain)
    with pytest.raises(FileDamagedError, match="carries no settings"):
        read_picture(plain)
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    with pytest.raises(FileDamagedError, match="cannot be read as a PNG"):
        read_picture(text)


@pytest.mark.parametrize(
    "changes", [{"threads": 0}, {"threads": "2"}, {"device": None}, {"versions": []}, {"recipe": 1}]
)
def test_records_that_make_no_sense(file, painting, changes):
    rewrite(file, painting, **changes)
    with pytest.raises(FileDamagedError):
        read_picture(file)


def test_a_cut_off_picture(file):
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(FileDamagedError):
        read_picture(file)


# rerun


def test_rerun_paints_the_same_pixels(file, painting):
    result = gossamer.rerun(file)
    assert result.identical
    assert result.largest_difference == 0
    assert result.notes == ()
    assert result.painting.recipe == painting.recipe


def test_rerun_uses_the_recorded_number_of_threads(file, painting, monkeypatch):
    rewrite(file, painting, threads=3)
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert gossamer.rerun(file).identical
    assert asked == [3, torch.get_num_threads()]


def test_rerun_with_adapter_and_control(pipe, bundled, tmp_path):
    guide = tmp_path / "guide.png"
    Image.effect_noise((64, 64), 90).point(lambda level: 255 if level > 200 else 0).save(guide)
    pipe.attach("pencil:0.7")
    pipe.attach(str(bundled["edges"]))
    try:
        image = pipe("a cone", seed=2, steps=2, size=SMALL, control=str(guide))
    finally:
        pipe.detach("edges")
        pipe.detach("pencil")
    file = save(image, tmp_path / "picture.png")
    assert gossamer.rerun(file).identical
    Image.new("RGB", (64, 64)).save(guide)
    with pytest.raises(NotReproducibleError, match="control picture"):
        gossamer.rerun(file)


def test_rerun_reads_the_control_picture_as_it_was_read(pipe, bundled, tmp_path):
    photo = tmp_path / "photo.png"
    Image.effect_noise((64, 64), 30).save(photo)
    pipe.attach(str(bundled["edges"]))
    try:
        for kind in ("map", "picture"):
            image = pipe("a cone", seed=2, steps=2, size=SMALL, control=str(photo), control_kind=kind)
            result = gossamer.rerun(save(image, tmp_path / f"{kind}.png"))
            assert result.identical
            assert result.painting.recipe.control.kind == kind
    finally:
        pipe.detach("edges")


def test_rerun_says_when_the_model_is_loaded(file):
    told = []
    ready = prepare_rerun(file)
    ready.paint(lambda done, total: told.append(done), lambda: told.append("loaded"))
    assert told == ["loaded", 1, 2]


def test_rerun_notices_another_adapter(pipe, tmp_path, embedded_spec, adapter_files):
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(adapter_files["pencil"].read_bytes())
    pipe.attach(str(mine))
    try:
        file = save(pipe("a cone", steps=1, size=SMALL), tmp_path / "picture.png")
    finally:
        pipe.detach("mine")
    write_adapter(read_adapter(mine, embedded_spec), mine, "kohya", {})
    with pytest.raises(NotReproducibleError, match="mine"):
        gossamer.rerun(file)
    mine.unlink()
    with pytest.raises(FileMissingError, match="mine"):
        gossamer.rerun(file)


def rewrite(file, painting, **changes):
    record = json.loads(painting.image.info["gossamer"])
    for path, value in changes.items():
        place = record
        *above, last = path.split("__")
        for key in above:
            place = place[key]
        place[last] = value
    image = painting.image.copy()
    image.info = {"gossamer": json.dumps(record)}
    save(image, file)


def test_rerun_notices_another_model(file, painting):
    rewrite(file, painting, recipe__model__components__vae="0" * 64)
    with pytest.raises(NotReproducibleError, match="model") as caught:
        gossamer.rerun(file)
    assert "vae" in caught.value.why


def test_rerun_refuses_what_no_file_holds(file, painting):
    rewrite(file, painting, recipe__model__components=None)
    with pytest.raises(NotReproducibleError, match="made in memory"):
        gossamer.rerun(file)
    rewrite(file, painting, recipe__control={"kind": "map", "source": None, "sha256": "0"})
    with pytest.raises(NotReproducibleError, match="given in memory"):
        gossamer.rerun(file)


def test_rerun_says_what_differs(file, painting):
    rewrite(file, painting, versions__torch="1.0", device="cuda", pixels_sha256="0" * 64)
    result = gossamer.rerun(file)
    assert not result.identical
    assert result.largest_difference == 0
    assert [note.split()[0] for note in result.notes] == ["torch", "the", "the"]


# jobs


def test_slugs():
    assert slug("A Red Sphere, on top!") == "a-red-sphere-on-top"
    assert slug("球 and Ÿ") == "球-and-ÿ"
    assert slug("!!!") == "picture"
    assert len(slug("word " * 50)) <= 40
    assert "/" not in slug("../../etc/passwd")


def test_prompts_files(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffone\n\n# note\n  two  \none\n", "utf-8")
    assert read_prompts(path) == ["one", "two"]
    for content, kind in ((b"# only\n\n", InvalidOptionError), (b"\xff\xfe\x00", FileDamagedError)):
        path.write_bytes(content)
        with pytest.raises(kind):
            read_prompts(path)
    with pytest.raises(FileMissingError):
        read_prompts(tmp_path)


def test_prompts_with_one_slug_get_files_of_their_own(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red cube\na red cube!\na cone\n")
    jobs = plan_jobs(RunOptions(prompts=str(path), output=str(tmp_path), seeds=(1, 2)))
    assert len({job.path for job in jobs}) == 6
    assert tmp_path / "a-cone-1.png" in {job.path for job in jobs}
    path.write_text("a cone\na red cube!\na red cube\n")
    assert set(plan_jobs(RunOptions(prompts=str(path), output=str(tmp_path), seeds=(1, 2)))) == set(jobs)


def test_where_pictures_go(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    places = {
        None: "outputs/x-0.png",
        "new": "new/x-0.png",
        "y.png": "y.png",
        "folder.png": "folder.png/x-0.png",
        "v1.0": "v1.0/x-0.png",
    }
    for output, expected in places.items():
        (job,) = plan_jobs(RunOptions("x", output=output))
        assert job.path.as_posix() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"], "planning makes nothing"
    for output, seeds in (("y.jpg", (0,)), ("y.png", (0, 1))):
        with pytest.raises(InvalidOptionError):
            plan_jobs(RunOptions("x", output=output, seeds=seeds))


@pytest.mark.parametrize("output", ["file/x.png", "file", "/proc/x.png", "n" * 300 + ".png", "n" * 300 + "/"])
def test_places_that_cannot_be_written(output, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        plan_jobs(RunOptions("x", output=output))


def test_only_the_very_same_settings_count_as_done(painting, file):
    job = Job(PROMPT, 5, file)
    assert divide([job], lambda _: painting.recipe, overwrite=False).done == (job,)
    moved = dataclasses.replace(painting.recipe, model=ModelUse("elsewhere", painting.recipe.model.components))
    assert divide([job], lambda _: moved, overwrite=False).done == (job,)
    for change in (
        {"steps": 3},
        {"storage": "fp8"},
        {"prompt": "other"},
        {"adapters": (AdapterUse("p", "p", 1.0, "0"),)},
    ):
        other: Recipe = dataclasses.replace(painting.recipe, **change)
        with pytest.raises(OutputError, match="not what this run would paint"):
            divide([job], lambda _, other=other: other, overwrite=False)
        assert divide([job], lambda _, other=other: other, overwrite=True).todo == (job,)


def test_a_foreign_file_is_never_replaced_unasked(painting, tmp_path):
    path = tmp_path / "x.png"
    np.save(path.open("wb"), np.zeros(3))
    with pytest.raises(OutputError):
        divide([Job("x", 0, path)], lambda _: painting.recipe, overwrite=False)
