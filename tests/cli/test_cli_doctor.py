import json

import pytest

from gossamer.cli import doctor
from gossamer.cli.main import main
from gossamer.formats import storage_names
from gossamer.kernels import detect as detect_module
from gossamer.kernels.capability import Capability

H200 = Capability(
    "cuda", "NVIDIA H200", "Linux", (2, 11), (9, 0), (13, 0), 91900, "3.6.0", flash=True, memory_bytes=150 * 10**9
)
APPLE = Capability("mps", "Apple arm64", "Darwin", (2, 13), triton_obstacle="no Triton on Apple")


def on(monkeypatch, capability: Capability) -> None:
    monkeypatch.setattr(detect_module, "detect", lambda device: capability)


def test_json_names_every_format_with_reasons(capsys, monkeypatch):
    on(monkeypatch, H200)
    assert main(["doctor", "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["machine"]["compute_capability"] == [9, 0]
    assert document["machine"]["chip"] == "Hopper (9.0)"
    assert [choice["storage"] for choice in document["choices"]] == list(storage_names())
    assert document["impossible"] == {}
    for choice in document["choices"]:
        assert {reason["part"] for reason in choice["reasons"]} == set(doctor.COLUMNS[1:])
        assert all(reason["text"] for reason in choice["reasons"] + choice["rejected"])


def test_text_of_all_formats(capsys, monkeypatch):
    on(monkeypatch, H200)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "NVIDIA H200: Hopper (9.0), Linux, CUDA 13.0, torch 2.11, 150.0 GB" in text
    assert "Triton: 3.6.0" in text
    assert "merge not triton: the decode kernels do not read IQ1_S" in text
    assert "merge triton: one pass" in text


def test_text_of_one_format_lists_what_was_rejected(capsys):
    assert main(["doctor", "--device", "cpu", "--storage", "nf4", "--compute", "int8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("Triton: no, ")
    assert ["compute", "int8", "chosen"] in [line.split()[:3] for line in lines]
    assert ["decode", "triton", "rejected"] in [line.split()[:3] for line in lines]


def test_a_format_that_the_device_cannot_hold_is_named_beside_the_others(capsys, monkeypatch):
    on(monkeypatch, APPLE)
    assert main(["doctor", "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document["impossible"]) == {"fp8", "fp8_e5m2"}
    assert len(document["choices"]) == len(storage_names()) - 2
    assert main(["doctor"]) == 0
    assert "fp8 cannot be used: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--storage", "nf5"], "unknown-storage", "nf4"),
        (["--compute", "fp9"], "unknown-option", "exact"),
        (["--compute", "fp8"], "invalid-option", "bf16"),
        (["--device", "nonsense"], "invalid-option", "nonsense"),
        (["--storage", "fp8"], "invalid-option", "Apple"),
    ],
)
def test_errors(argv, code, words, capsys, monkeypatch):
    if "--device" not in argv:
        on(monkeypatch, APPLE)
    assert main(["doctor", *argv, "--format", "json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == code
    assert words in " ".join(error.values())


@pytest.mark.parametrize(
    ("held", "expected"),
    [("abc", "all"), ("ab", "all but c"), ("a", "a"), ("", "")],
    ids=["all", "most", "few", "none"],
)
def test_summary(held, expected):
    assert doctor._summary(list(held), list("abc")) == expected
