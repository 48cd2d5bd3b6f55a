import json
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

from gossamer.cli.main import main
from gossamer.formats import storage_names
from gossamer.pipeline.options import LoadOptions, PaintOptions, RunOptions
from gossamer.pipeline.versions import VERSION

ROOT = Path(__file__).parent.parent.parent


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)


def test_importing_the_package_and_asking_for_help_import_no_torch():
    done = python("""
        import sys
        import gossamer
        from gossamer.cli.main import main
        for argv in (["--help"], ["run", "--help"], ["--version"]):
            try:
                main(argv)
            except SystemExit as stop:
                assert stop.code == 0
        assert gossamer.__version__ and "load" in dir(gossamer)
        heavy = {"torch", "numpy", "diffusers", "transformers", "safetensors", "PIL"} & set(sys.modules)
        assert not heavy, heavy
    """)
    assert done.returncode == 0, done.stderr
    assert "--control-kind" in done.stdout


def test_every_exported_name_exists():
    import gossamer

    assert all(getattr(gossamer, name) is not None for name in gossamer.__all__)
    assert sorted(gossamer._HOMES) == sorted(gossamer.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = gossamer.nothing


def test_the_version_is_the_package_s():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == VERSION


def test_every_option_has_an_argument(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    text = capsys.readouterr().out
    for kind in (LoadOptions, PaintOptions, RunOptions):
        for name, option in kind.__dataclass_fields__.items():
            if "argument" in option.metadata and name != "prompt":
                flag = option.metadata["argument"].flag or name
                assert "--" + flag.replace("_", "-") in text


def test_formats(capsys):
    assert main(["formats", "--format", "json"]) == 0
    listed = json.loads(capsys.readouterr().out)["formats"]
    assert [entry["name"] for entry in listed] == list(storage_names())
    bits = {entry["name"]: entry["bits_per_weight"] for entry in listed}
    assert (bits["fp32"], bits["nf4"]) == (32, 4.5)
    assert main(["formats"]) == 0
    assert "nf4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        ([], "invalid-option", "command"),
        (["rnu"], "invalid-option", "rnu"),
        (["run"], "invalid-option", "prompt"),
        (["run", "a", "b"], "unknown-option", "quotation"),
        (["run", "a", "--stpes", "3"], "unknown-option", "'--steps'"),
        (["run", "a", "--steps"], "invalid-option", "--steps"),
        (["run", "a", "--steps", "many"], "invalid-option", "many"),
        (["run", "a", "--steps", "-4"], "invalid-option", "-4"),
        (["run", "a", "--steps=-4"], "invalid-option", "-4"),
        (["run", "a", "--format", "xml"], "invalid-option", "xml"),
        (["run", "a", "--control-kind", "depth"], "invalid-option", "depth"),
        (["run", "a", "--control-kind", "picture"], "invalid-option", "--control IMAGE"),
        (["run", "a", "--lora", "pencil:abc"], "invalid-option", "'abc'"),
        (["run", "a", "--guidance", "1e39"], "invalid-option", "from 0 to 1000"),
        (["run", "a", "--guidance", "nan"], "invalid-option", "nan"),
        (["run", "a", "--prompts", "file"], "invalid-option", "either"),
        (["rerun"], "invalid-option", "PICTURE"),
    ],
)
def test_arguments_that_cannot_be_understood(argv, code, words, capsys):
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error[{code}]: ")
    assert words in printed.err
    assert "\n  why:  " in printed.err
    assert "\n  next: " in printed.err


def test_errors_as_json_even_while_parsing(capsys):
    assert main(["run", "a", "--stpes", "3", "--format", "json"]) == 2
    printed = capsys.readouterr()
    assert printed.err == ""
    assert set(json.loads(printed.out)["error"]) == {"code", "what", "why", "next"}
