import pytest

from gossamer.errors import AdapterError, FileMissingError, InvalidOptionError
from gossamer.pipeline.loras import LoraChoice, find_lora, parse_lora
from gossamer.pipeline.options import LoadOptions, PaintOptions, RunOptions, make
from gossamer.pipeline.parse import Size, parse_seeds, parse_size


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


@pytest.mark.parametrize("text", ["", ":0.5", "pencil:nan", "pencil:inf"])
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
