import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file

from gossamer.adapters import Adapter, LowRankTerm, write_adapter
from gossamer.cli.main import main
from gossamer.demo.embedded import model_folder
from gossamer.models.flux_spec import FluxSpec, linear_shapes
from gossamer.pipeline import load, painter, rerun
from gossamer.pipeline.picture import read_picture

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--steps", "2", "--size", "64x64"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> Path:
    """A folder of its own for every test, so that what is left behind can be listed."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def loaded_once(pipe, monkeypatch):
    """The runs of a test share the one loaded model; they still check, paint, write and report by themselves."""

    def assemble(prepared, tell=None):
        for name in pipe.adapters:
            pipe.detach(name)
        for named in prepared.adapters:
            pipe.attach_named(named)
        return pipe

    monkeypatch.setattr(load, "assemble", assemble)
    monkeypatch.setattr(rerun, "assemble", assemble)
    yield pipe
    for name in pipe.adapters:
        pipe.detach(name)


def run_json(capsys, *argv: str) -> dict:
    code = main(["run", *argv, *QUICK, "--storage", "nf4", "--format", "json"])
    printed = capsys.readouterr()
    assert code == 0, printed
    return json.loads(printed.out)


def line_map(size: int) -> Image.Image:
    """White on black, different each time, as an edge map is."""
    return Image.effect_noise((size, size), 90).point(lambda level: 255 if level > 200 else 0).convert("RGB")


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


COMMAND = [sys.executable, "-m", "gossamer"]


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **changes}


def gossamer(*argv: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *argv], capture_output=True, text=True, check=False, env=environment(**changes))


def test_the_whole_way_in_processes_of_its_own(elsewhere):
    done = gossamer("run", "a red sphere", *QUICK, "--storage", "nf4", "--seed", "4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("outputs/a-red-sphere-4.png")
    assert "requires torchvision" not in done.stderr
    assert read_picture("outputs/a-red-sphere-4.png").recipe.storage == "nf4"
    again = gossamer("rerun", "outputs/a-red-sphere-4.png")
    assert again.returncode == 0, again.stderr
    assert "the same pixels" in again.stdout
    assert listing(elsewhere) == ["outputs/a-red-sphere-4-rerun.png", "outputs/a-red-sphere-4.png"]


def test_an_interrupted_process_leaves_whole_pictures_only(elsewhere):
    (elsewhere / "prompts.txt").write_text("a cone\na cube\n")
    argv = ["run", "--prompts", "prompts.txt", "--seed", "0-499", "--output", "made", *QUICK]
    running = subprocess.Popen([*COMMAND, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    try:
        while running.poll() is None and not (elsewhere / "made" / "a-cone-1.png").exists():
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130
    assert b"Run the same command to resume" in err
    assert b"Traceback" not in err
    made = listing(elsewhere / "made")
    assert len(made) - len(out.splitlines()) in (0, 1), "the last may be written and not yet told"
    assert all(read_picture(elsewhere / "made" / name).recipe.prompt == "a cone" for name in made)


def test_an_adapter_that_the_hub_cannot_hand_out(elsewhere, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(elsewhere.parent / "hub"))
    assert main(["run", "x", "--lora", "owner/name/ink.safetensors:0.5"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error[file-missing]: Nothing of 'owner/name/ink.safetensors' at 'main'")
    assert len(told.splitlines()) == 3


def test_a_model_that_the_hub_cannot_hand_out(elsewhere):
    done = gossamer("run", "x", "--model", "owner/name", HF_HUB_OFFLINE="1", HF_HOME=str(elsewhere.parent / "hub"))
    assert done.returncode == 2
    assert done.stderr.startswith("error[file-missing]: The model 'owner/name' is not on this machine")
    assert len(done.stderr.splitlines()) == 3


def test_what_json_says(loaded_once, bundled, capsys):
    document = run_json(capsys, "a cone", "--seed", "0-1", "--lora", "pencil:0.5", "--output", "made")
    assert document["interrupted"] is False
    first, second = document["pictures"]
    assert first["path"] == os.path.join("made", "a-cone-0.png")
    assert (first["seed"], second["seed"]) == (0, 1)
    assert first["adapters"] == {"pencil": 0.5}
    assert first["storage"] == "nf4"
    assert first["weight_bytes"] == loaded_once.weight_bytes
    assert first["kept_layers"]["proj_out"] == "bf16"
    assert first["seconds_per_step"] > 0
    assert first["pixels_sha256"] == read_picture(first["path"]).pixels_sha256 != second["pixels_sha256"]


def test_what_is_said_of_each_adapter(loaded_once, bundled, capsys):
    argv = ["a cone", *QUICK, "--storage", "nf4", "--lora", "pencil:0.5@0.5-1"]
    assert main(["run", *argv]) == 0
    told = capsys.readouterr().err.splitlines()
    linears = sum(name.endswith(("attn.to_q", "proj_mlp")) for name in linear_shapes(loaded_once._adapters.spec))
    expected = (
        f"pencil: {linears} linears of the transformer, rank 4, spelling diffusers, scale 0.5, step 2 of 2 (0.5-1)"
    )
    assert expected in told
    assert read_picture("outputs/a-cone-0.png").recipe.adapters[0].start == 0.5
    assert main(["rerun", "outputs/a-cone-0.png"]) == 0
    assert expected in capsys.readouterr().err.splitlines()


def test_adapters_in_json(loaded_once, bundled, capsys, embedded_spec):
    line_map(64).save("guide.png")
    down, up = torch.ones(2, embedded_spec.width) * 0.1, torch.ones(embedded_spec.width, 2) * 0.1
    stem = "transformer.transformer_blocks.0.attn.to_k"
    tensors = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    tensors |= {f"{stem}.lora_magnitude_vector": torch.ones(embedded_spec.width)}
    save_file(tensors | {"bundle_emb.word.clip_l": torch.ones(1, 8)}, "dora.safetensors")
    argv = ["a cone", "--control", "guide.png", "--lora", "dora.safetensors:0.8@0-0.5", "--output", "x.png"]
    document = run_json(capsys, *argv)
    dora, edges = document["adapters"]
    assert (dora["name"], dora["source"], dora["scale"]) == ("dora", "dora.safetensors", 0.8)
    assert (dora["start"], dora["end"], dora["fused"]) == (0.0, 0.5, False)
    assert (dora["modules"], dora["ranks"]) == ({"transformer": 1}, [2])
    assert list(dora["unused"].values()) == [["bundle_emb.word.clip_l"]]
    assert dora["merged_bytes"] == 0
    assert dora["factor_bytes"] == sum(tensor.numel() * 4 for tensor in tensors.values())
    assert (edges["name"], edges["spelling"], edges["end"]) == ("edges", "bfl", 1.0)
    (picture,) = document["pictures"]
    assert picture["adapters"] == {"dora": 0.8, "edges": 1.0}
    assert picture["schedules"] == {"dora": [0.0, 0.5]}
    assert run_json(capsys, *argv)["adapters"][0]["factor_bytes"] is None, "nothing had to be loaded"
    assert main(["run", *argv, *QUICK, "--storage", "nf4", "--overwrite", "--seed", "1"]) == 0
    told = capsys.readouterr().err
    assert "dora.safetensors: 1 tensors have no effect, such as 'bundle_emb.word.clip_l'" in told
    assert "dora: DoRA: 1 linears are merged anew at every call." in told


def test_a_window_is_part_of_the_settings(loaded_once, bundled, capsys):
    argv = ["a cone", "--output", "x.png", "--lora"]
    run_json(capsys, *argv, "pencil@0-0.5")
    assert run_json(capsys, *argv, "pencil:1@0-0.5")["pictures"][0]["painted"] is False
    assert main(["run", *argv, "pencil", *QUICK, "--storage", "nf4"]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_a_run_resumes_where_it_stopped(loaded_once, elsewhere, capsys, monkeypatch):
    (elsewhere / "prompts.txt").write_text("# three\na cone\n\na cube\na ring\n")
    argv = ["--prompts", "prompts.txt", "--output", "made"]
    paint, painted = painter.Pipeline.paint, []

    def interrupted(self, options, on_step=None):
        if len(painted) == 2:
            raise KeyboardInterrupt
        painted.append(options.prompt)
        return paint(self, options, on_step)

    monkeypatch.setattr(painter.Pipeline, "paint", interrupted)
    assert main(["run", *argv, *QUICK, "--storage", "nf4", "--format", "json"]) == 130
    printed = capsys.readouterr()
    assert json.loads(printed.out)["interrupted"] is True
    assert "1 of 3 pictures left" in printed.err
    assert "resume" in printed.err
    assert listing(elsewhere / "made") == ["a-cone-0.png", "a-cube-0.png"]
    monkeypatch.setattr(painter.Pipeline, "paint", paint)
    resumed = run_json(capsys, *argv)["pictures"]
    assert sorted((entry["prompt"], entry["painted"]) for entry in resumed) == [
        ("a cone", False),
        ("a cube", False),
        ("a ring", True),
    ]


def test_other_settings_never_replace_a_picture_unasked(loaded_once, bundled, capsys):
    argv = ["a cone", "--output", "x.png"]
    run_json(capsys, *argv)
    before = Path("x.png").read_bytes()
    assert main(["run", *argv, *QUICK, "--storage", "fp8"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["run", *argv, *QUICK, "--storage", "nf4", "--lora", "pencil"]) == 2
    assert Path("x.png").read_bytes() == before
    capsys.readouterr()
    assert run_json(capsys, *argv, "--lora", "pencil", "--overwrite")["pictures"][0]["painted"] is True
    assert Path("x.png").read_bytes() != before


def test_control_brings_its_own_lora(loaded_once, bundled, capsys):
    line_map(80).save("guide.png")
    (picture,) = run_json(capsys, "a cone", "--control", "guide.png", "--lora", "pencil")["pictures"]
    assert picture["adapters"] == {"pencil": 1.0, "edges": 1.0}
    (other,) = run_json(capsys, "a cone", "--control", "guide.png", "--lora", "edges:0.5", "--output", "y.png")[
        "pictures"
    ]
    assert other["adapters"] == {"edges": 0.5}
    assert main(["rerun", picture["path"]]) == 0


def test_the_shipped_adapters_by_name(loaded_once, capsys):
    line_map(64).save("guide.png")
    painted = [
        run_json(capsys, "a cone", *argv, "--output", f"{number}.png")["pictures"][0]
        for number, argv in enumerate(
            (
                [],
                ["--lora", "pencil"],
                ["--lora", "neon:0.5"],
                ["--lora", "pencil:0.7", "--lora", "neon:0.3"],
                ["--control", "guide.png", "--lora", "neon"],
            )
        )
    ]
    assert [picture["adapters"] for picture in painted] == [
        {},
        {"pencil": 1.0},
        {"neon": 0.5},
        {"pencil": 0.7, "neon": 0.3},
        {"neon": 1.0, "edges": 1.0},
    ]
    assert len({picture["pixels_sha256"] for picture in painted}) == len(painted)
    assert main(["rerun", "4.png"]) == 0


def test_the_demo_of_the_makefile(loaded_once, capsys):
    made = subprocess.run(["make", "-n", "demo"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    (line,) = [line for line in made.splitlines() if "gossamer run" in line]
    _, verb, *argv = shlex.split(line)
    assert (verb, argv[-3:]) == ("run", ["--output", "outputs/demo.png", "--overwrite"])
    (picture,) = run_json(capsys, *argv[:-3], "--output", "demo.png")["pictures"]
    assert picture["storage"] == "nf4"
    assert picture["adapters"], "the demo shows an adapter on quantised weights"
    assert f"The picture is {ROOT}/outputs/demo.png" in made


def test_edges_are_extracted_from_a_picture(loaded_once, bundled, capsys):
    guide = Image.new("RGB", (64, 64))
    guide.paste((255, 255, 255), (16, 16, 48, 48))
    guide.save("guide.png")
    shas = [
        run_json(capsys, "a cone", "--control", "guide.png", "--control-kind", kind, "--output", f"{kind}.png")[
            "pictures"
        ][0]
        for kind in ("map", "picture")
    ]
    assert shas[0]["pixels_sha256"] != shas[1]["pixels_sha256"]


def test_the_kind_that_auto_decided_is_recorded(loaded_once, bundled, capsys):
    line_map(64).save("guide.png")
    argv = ["a cone", "--control", "guide.png", "--output", "x.png"]
    (painted,) = run_json(capsys, *argv)["pictures"]
    assert read_picture("x.png").recipe.control.kind == "map"
    (again,) = run_json(capsys, *argv, "--control-kind", "map")["pictures"]
    assert (painted["painted"], again["painted"]) == (True, False)
    assert main(["rerun", "x.png"]) == 0


def test_rerun_says_that_it_paints(loaded_once, capsys):
    run_json(capsys, "a cone", "--output", "x.png")
    assert main(["rerun", "x.png"]) == 0
    told = capsys.readouterr().err
    assert "Painting" in told
    assert "2/2" in told
    assert not any("Loading" in line and "2/2" in line for line in told.splitlines())


def test_rerun_never_replaces_unasked_and_says_when_pixels_differ(loaded_once, capsys):
    run_json(capsys, "a cone", "--output", "x.png")
    assert main(["rerun", "x.png", "--output", "x.png"]) == 2
    capsys.readouterr()
    picture = Image.open("x.png")
    record = json.loads(picture.info["gossamer"])
    record["pixels_sha256"] = "0" * 64
    picture.info["gossamer"] = json.dumps(record)
    from gossamer.pipeline.picture import save

    save(picture, "changed.png")
    assert main(["rerun", "changed.png", "--format", "json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["identical"] is False
    assert document["largest_difference"] == 0
    assert document["warnings"] == ["the pixels in the file were changed since it was painted"]


# bad input


def big_flux_adapter(path: Path) -> None:
    """An adapter of FLUX.1-dev's own size."""
    spec = FluxSpec(19, 38, 24, 128, 64, 64, 4096, 768, guidance_embeds=True)
    term = LowRankTerm(torch.zeros(1, 3072), torch.zeros(3072, 1))
    write_adapter(Adapter(spec, {"transformer_blocks.0.attn.to_q": term}), path)


def cut(path: Path, target: Path, size: int) -> None:
    target.write_bytes(path.read_bytes()[:size])


def prepare_bad(here: Path, adapters: dict[str, Path]) -> None:
    big_flux_adapter(here / "big.safetensors")
    cut(adapters["pencil"], here / "cut.safetensors", 3000)
    (here / "web.safetensors").write_text("<!DOCTYPE html><html></html>")
    (here / "noise.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 50)
    (here / "empty.txt").write_text("\n# nothing\n")
    (here / "plain").write_text("a file")
    Image.effect_noise((64, 64), 30).save(here / "photo.png")
    Image.new("RGB", (64, 64), "white").save(here / "paper.png")
    for part in ("vae", "transformer"):
        shutil.copy(sorted((model_folder() / part).glob("*.safetensors"))[0], here / f"{part}.safetensors")
    model = shutil.copytree(model_folder(), here / "model", copy_function=os.link)
    weights = sorted(Path(model, "transformer").glob("*.safetensors"))[0]
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content[: len(content) // 2])


BAD = {
    "unknown storage": (["x", "--storage", "nf5"], "unknown-storage", "nf4"),
    "unknown text storage": (["x", "--text-storage", "q9"], "unknown-storage", "q9"),
    "missing model": (["x", "--model", "no/such/model"], "file-missing", "no/such/model"),
    "missing adapter": (["x", "--lora", "no.safetensors"], "file-missing", "no.safetensors"),
    "unknown adapter": (["x", "--lora", "pensil"], "adapter", "pencil, edges"),
    "same adapter twice": (["x", "--lora", "pencil", "--lora", "pencil:0.5"], "adapter", "twice"),
    "adapter of another model": (["x", "--lora", "big.safetensors"], "wrong-model", "big.safetensors"),
    "cut adapter": (["x", "--lora", "cut.safetensors"], "file-damaged", "cut.safetensors"),
    "autoencoder as adapter": (["x", "--lora", "vae.safetensors"], "adapter", "a checkpoint of a VAE"),
    "transformer as adapter": (["x", "--lora", "transformer.safetensors"], "adapter", "a checkpoint of a transformer"),
    "scale of an adapter": (["x", "--lora", "pencil:abc"], "invalid-option", "is not a number: 'abc'"),
    "no scale of an adapter": (["x", "--lora", "pencil:"], "invalid-option", "is not a number: ''"),
    "infinite scale": (["x", "--lora", "pencil:1e999"], "invalid-option", "inf"),
    "window of an adapter": (["x", "--lora", "pencil@0.2"], "invalid-option", "cannot be read: '0.2'"),
    "window upside down": (["x", "--lora", "pencil@0.9-0.2"], "invalid-option", "no part of a run"),
    "window without steps": (["x", "--lora", "pencil@0.41-0.44"], "invalid-option", "0.41 <= i/20 < 0.44"),
    "web page as adapter": (["x", "--lora", "web.safetensors"], "file-damaged", "web page"),
    "cut model": (["x", "--model", "model"], "file-damaged", "transformer"),
    "size": (["x", "--size", "250x256"], "invalid-option", "256x256"),
    "empty prompt": ([""], "invalid-option", "prompt"),
    "blank prompt": (["  "], "invalid-option", "prompt"),
    "seed": (["x", "--seed", "-1"], "invalid-option", "-1"),
    "seed word": (["x", "--seed", "lucky"], "invalid-option", "lucky"),
    "steps": (["x", "--steps", "-5"], "invalid-option", "-5"),
    "device": (["x", "--device", "tpu"], "invalid-option", "tpu"),
    "skip": (["x", "--skip", "nothing.*", "--storage", "nf4"], "unknown-option", "nothing.*"),
    "output under a file": (["x", "--output", "plain/x.png"], "output", "plain"),
    "output is no PNG": (["x", "--output", "x.jpg"], "invalid-option", ".jpg"),
    "missing control": (["x", "--control", "no.png"], "file-missing", "no.png"),
    "damaged control": (["x", "--control", "noise.png"], "file-damaged", "noise.png"),
    "photo as map": (["x", "--control", "photo.png"], "invalid-option", "--control-kind picture"),
    "white paper as map": (["x", "--control", "paper.png"], "invalid-option", "100% are white"),
    "control kind alone": (["x", "--control-kind", "picture"], "invalid-option", "without a control picture"),
    "control lora alone": (["x", "--lora", "edges"], "invalid-option", "--control"),
    "missing prompts": (["--prompts", "no.txt"], "file-missing", "no.txt"),
    "empty prompts": (["--prompts", "empty.txt"], "invalid-option", "empty.txt"),
    "long adapter name": (["x", "--lora", "n" * 5000], "adapter", "nnn"),
    "long model name": (["x", "--model", "n" * 5000], "file-missing", "nnn"),
}


@pytest.mark.parametrize(("argv", "code", "words"), BAD.values(), ids=BAD)
def test_bad_input(argv, code, words, elsewhere, bundled, capsys, monkeypatch):
    prepare_bad(elsewhere, bundled)
    before = listing(elsewhere)
    assert main(["run", *argv]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error[{code}]: "), printed.err
    assert words in printed.err
    assert "\n  why:  " in printed.err
    assert "\n  next: " in printed.err
    assert "Traceback" not in printed.err
    assert listing(elsewhere) == before, "nothing half-written"


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(
    ("lora", "code", "words"),
    [("pencil:1e38", "invalid-option", "not finite"), ("pencil:1e39", "adapter", "cannot act at scale 1e+39")],
)
def test_an_overflow_writes_no_picture(lora, code, words, elsewhere, loaded_once, bundled, capsys):
    assert main(["run", "x", *QUICK, "--storage", "nf4", "--lora", lora, "--output", "made/x.png"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"error[{code}]: " in printed.err
    assert words in printed.err
    assert "Traceback" not in printed.err
    assert listing(elsewhere) == []


@pytest.mark.parametrize(
    "argv", [["run", "x", "--storage", "nf5"], ["run", "x", "--size", "17x16"], ["rerun", "no.png"]]
)
def test_bad_input_in_a_process_of_its_own(argv, elsewhere):
    done = gossamer(*argv)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error[")
    assert len(done.stderr.splitlines()) == 3
    assert listing(elsewhere) == []


def test_no_model_is_loaded_for_bad_input(monkeypatch, capsys):
    monkeypatch.setattr(load, "load_components", lambda *_: pytest.fail("a model was loaded"))
    for argv in (["x", "--output", "/proc/x.png"], ["x", "--storage", "nf5"], ["x", "--lora", "no.safetensors"]):
        assert main(["run", *argv]) == 2
