from pathlib import Path

import pytest

from gossamer.errors import AdapterError, FileMissingError, InvalidOptionError
from gossamer.pipeline.loras import LoraChoice, choose_lora, find_lora, parse_lora
from gossamer.pipeline.options import LoadOptions, PaintOptions, RunOptions, make
from gossamer.pipeline.parse import Size, parse_seeds, parse_size
from gossamer.pipeline.schedule import Schedule


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("7", (7,)),
        ("1,5,9", (1, 5, 9)),
        ("0-3", (0, 1, 2, 3)),
        ("0-1, 8", (0, 1, 8)),
        ("5-5", (5,)),
        (str(2**63 - 1), (2**63 - 1,)),
    ],
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "-1", "3-1", "1,,2", "1.5", str(2**63), "0-99999999", "0-9999,20000", "1e3"])
def test_bad_seeds(text):
    with pytest.raises(InvalidOptionError, match="seed"):
        parse_seeds(text)


@pytest.mark.parametrize(
    ("text", "source", "scale"),
    [
        ("pencil", "pencil", 1.0),
        ("pencil:0.8", "pencil", 0.8),
        ("pencil:-1", "pencil", -1.0),
        (r"C:\styles\ink.safetensors", r"C:\styles\ink.safetensors", 1.0),
        (r"C:\styles\ink.safetensors:0.5", r"C:\styles\ink.safetensors", 0.5),
        ("styles:old/ink", "styles:old/ink", 1.0),
        ("a:b.safetensors", "a:b.safetensors", 1.0),
        ("a:b.safetensors:2", "a:b.safetensors", 2.0),
    ],
)
def test_loras(text, source, scale):
    assert parse_lora(text) == LoraChoice(source, scale)


def test_a_file_whose_name_ends_like_a_scale(tmp_path):
    path = tmp_path / "ink:0.5"
    path.write_bytes(b"")
    assert parse_lora(str(path)) == LoraChoice(str(path))
    assert parse_lora(f"{path}:0.25") == LoraChoice(str(path), 0.25)


@pytest.mark.parametrize(
    ("text", "name", "tail"),
    [
        ("pencil:abc", "pencil", "abc"),
        ("pencil:", "pencil", ""),
        ("pencil:0,5", "pencil", "0,5"),
        ("pencil:0.5:x", "pencil:0.5", "x"),
        ("styles/ink.safetensors:strong", "styles/ink.safetensors", "strong"),
        (r"C:\styles\ink.safetensors:0.5x", r"C:\styles\ink.safetensors", "0.5x"),
    ],
)
def test_a_scale_that_is_not_a_number(text, name, tail):
    with pytest.raises(InvalidOptionError, match="is not a number") as caught:
        parse_lora(text)
    assert caught.value.what == f"The scale of adapter {name!r} is not a number: {tail!r}."


def test_an_existing_file_with_a_colon_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a:b.safetensors", "a:b", "pencil:abc"):
        (tmp_path / name).write_bytes(b"")
        assert parse_lora(name) == LoraChoice(name)
        assert parse_lora(f"{name}:0.25") == LoraChoice(name, 0.25)
        assert find_lora(LoraChoice(name)).name == name


def test_the_short_name_of_a_windows_path():
    assert LoraChoice(r"C:\styles\ink.v2.safetensors").stem == "ink.v2"


@pytest.mark.parametrize(
    ("text", "source", "scale", "start", "end"),
    [
        ("pencil@0.2-0.9", "pencil", 1.0, 0.2, 0.9),
        ("pencil:0.8@0.2-0.9", "pencil", 0.8, 0.2, 0.9),
        ("pencil:-1@0-.5", "pencil", -1.0, 0.0, 0.5),
        ("styles/ink.safetensors:0.5@0.25-1", "styles/ink.safetensors", 0.5, 0.25, 1.0),
        (r"C:\styles\ink.safetensors@0.5-1.0", r"C:\styles\ink.safetensors", 1.0, 0.5, 1.0),
        (r"C:\me@home\ink.safetensors:0.5@0.5-1", r"C:\me@home\ink.safetensors", 0.5, 0.5, 1.0),
        ("ink@2.safetensors", "ink@2.safetensors", 1.0, 0.0, 1.0),
        ("ink@2.safetensors:0.5", "ink@2.safetensors", 0.5, 0.0, 1.0),
        ("me@home/ink:0.5", "me@home/ink", 0.5, 0.0, 1.0),
        ("owner/name/ink@0.2-0.9.safetensors", "owner/name/ink@0.2-0.9.safetensors", 1.0, 0.0, 1.0),
        ("owner/name:0.5@0-0.9", "owner/name", 0.5, 0.0, 0.9),
    ],
)
def test_windows(text, source, scale, start, end):
    assert parse_lora(text) == LoraChoice(source, scale, Schedule(start, end))


@pytest.mark.parametrize(
    ("text", "name", "tail"),
    [
        ("pencil@", "pencil", ""),
        ("pencil@abc", "pencil", "abc"),
        ("pencil@0.2", "pencil", "0.2"),
        ("pencil:0.5@0.2", "pencil:0.5", "0.2"),
        ("pencil@-0.1-0.9", "pencil", "-0.1-0.9"),
        ("pencil@0.2-0.9:0.5", "pencil", "0.2-0.9:0.5"),
        ("pencil@0.2:0.9", "pencil", "0.2:0.9"),
        ("pencil:0.5@0,2-0,9", "pencil:0.5", "0,2-0,9"),
        ("ink.safetensors@20%-90%", "ink.safetensors", "20%-90%"),
    ],
)
def test_windows_that_cannot_be_read(text, name, tail):
    with pytest.raises(InvalidOptionError) as caught:
        parse_lora(text)
    assert caught.value.what == f"The steps in which adapter {name!r} acts cannot be read: {tail!r}."
    assert "START-END" in caught.value.why
    assert f"{name.partition(':')[0]}:0.8@0.2-0.9" in caught.value.next_step


@pytest.mark.parametrize("text", ["pencil@20-90", "pencil@0.9-0.2", "pencil@0.5-0.5", "pencil@0-1.5"])
def test_windows_that_are_no_part_of_a_run(text):
    with pytest.raises(InvalidOptionError, match="is no part of a run"):
        parse_lora(text)


def test_an_existing_file_whose_name_reads_as_a_window(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("ink@0.2-0.9", "ink:0.5@0.2-0.9", "me@home", "ink@0.2-0.9:0.5"):
        (tmp_path / name).write_bytes(b"")
    for name in ("ink@0.2-0.9", "ink:0.5@0.2-0.9", "me@home", "ink@0.2-0.9:0.5"):
        assert parse_lora(name) == LoraChoice(name)
        assert parse_lora(f"{name}:0.25") == LoraChoice(name, 0.25)
        assert parse_lora(f"{name}@0.5-1") == LoraChoice(name, 1.0, Schedule(0.5, 1))
        assert parse_lora(f"{name}:0.25@0.5-1") == LoraChoice(name, 0.25, Schedule(0.5, 1))
        assert find_lora(LoraChoice(name)).name == name


def test_a_source_with_numbers_beside_it():
    assert choose_lora("pencil:0.5@0.2-0.9") == LoraChoice("pencil", 0.5, Schedule(0.2, 0.9))
    assert choose_lora("pencil", 0.5, 0.2) == LoraChoice("pencil", 0.5, Schedule(0.2, 1))
    assert choose_lora("pencil:0.5", end=0.2) == LoraChoice("pencil:0.5", 1.0, Schedule(0, 0.2)), "never both ways"
    assert choose_lora(Path("x:0.5")) == LoraChoice("x:0.5")
    choice = LoraChoice("pencil", 0.5, Schedule(0.2, 0.9))
    assert choose_lora(choice) == choice
    assert choose_lora(choice, end=1) == LoraChoice("pencil", 0.5, Schedule(0.2, 1))


@pytest.mark.parametrize("text", ["", ":0.5", "pencil:nan", "pencil:inf", "@0.2-0.9", ":0.5@0.2-0.9"])
def test_bad_loras(text):
    with pytest.raises(InvalidOptionError):
        parse_lora(text)


def test_missing_loras_name_what_there_is(bundled, tmp_path):
    with pytest.raises(AdapterError, match="Did you mean 'pencil'") as caught:
        find_lora(LoraChoice("pensil"))
    assert "pencil" in caught.value.why
    assert "edges" in caught.value.why
    for missing in ("styles/ink.safetensors", "ink.safetensors", r"C:\ink", str(tmp_path)):
        with pytest.raises(FileMissingError):
            find_lora(LoraChoice(missing))


def test_sizes():
    assert parse_size("256x128") == Size(256, 128)
    for text in ("250x256", "0x16", "-16x16", "16", "axb", "8208x16"):
        with pytest.raises(InvalidOptionError, match=r"size|picture"):
            parse_size(text)


def test_none_means_the_default():
    assert make(LoadOptions, {"model": None, "device": None}) == LoadOptions()
    assert make(PaintOptions, {"prompt": "x", "size": None}) == PaintOptions("x")


def test_texts_are_read_and_values_taken_as_they_are():
    options = make(PaintOptions, {"prompt": "x", "steps": "7", "size": "32x64", "guidance": 2})
    assert (options.steps, options.size, options.guidance) == (7, Size(32, 64), 2)
    assert make(LoadOptions, {"loras": "pencil:0.5"}).loras == (LoraChoice("pencil", 0.5),)
    assert make(RunOptions, {"prompt": "x", "seeds": ["0-2", "1", "9"]}).seeds == (0, 1, 2, 9)


def test_a_control_kind_needs_a_control_picture():
    for kind in ("map", "picture"):
        with pytest.raises(InvalidOptionError, match="without a control picture"):
            PaintOptions("x", control_kind=kind)
        assert PaintOptions("x", control="guide.png", control_kind=kind).control_kind == kind
    assert PaintOptions("x").control_kind == PaintOptions("x", control="guide.png").control_kind == "auto"


def test_a_run_has_one_source_of_prompts():
    for values in ({}, {"prompt": "x", "prompts": "file"}):
        with pytest.raises(InvalidOptionError, match="either"):
            make(RunOptions, values)
