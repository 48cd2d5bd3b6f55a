from types import SimpleNamespace

import pytest
import torch

from gossamer.errors import InvalidOptionError
from gossamer.kernels import detect as module
from gossamer.kernels.choice import choose
from gossamer.kernels.detect import detect


@pytest.fixture
def fake_gpu(monkeypatch):
    """One H200 as torch would report it."""
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=150_000_000_000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(module, "_triton", lambda: ("3.6.0", None))
    return monkeypatch


def test_a_cpu():
    found = detect("cpu")
    assert (found.kind, found.compute_capability, found.triton) == ("cpu", None, None)
    assert found.torch_version == tuple(int(part) for part in torch.__version__.split(".")[:2])
    assert found.memory_bytes is None or found.memory_bytes > 10**8
    assert detect(torch.device("cpu")) == found


def test_a_gpu_is_preferred_where_there_is_one(fake_gpu):
    found = detect()
    assert (found.kind, found.name, found.compute_capability, found.chip) == (
        "cuda",
        "NVIDIA H200",
        (9, 0),
        "Hopper (9.0)",
    )
    assert (found.cuda_version, found.cudnn_version, found.triton, found.flash) == ((13, 0), 91900, "3.6.0", True)
    assert choose(found, "nf4").compute == "fp8"


def test_an_amd_gpu_has_no_compute_capability(fake_gpu):
    fake_gpu.setattr(torch.version, "hip", "7.1")
    fake_gpu.setattr(torch.version, "cuda", None)
    found = detect("cuda:0")
    assert (found.kind, found.compute_capability, found.cuda_version, found.cudnn_version) == ("rocm", None, None, None)
    assert choose(found, "nf4").compute == "bf16"


def test_triton_and_why_not(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(module.platform, "system", lambda: "Linux")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert "not installed" in module._triton()[1]
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    assert "C compiler" in module._triton()[1]
    monkeypatch.setattr(module, "version", lambda package: {"triton": "3.6.0"}[package])
    monkeypatch.setenv("CC", "mycc")
    assert module._triton() == ("3.6.0", None)
    monkeypatch.delenv("CC")
    monkeypatch.setattr(module.platform, "system", lambda: "Windows")
    assert module._triton() == ("3.6.0", None)


@pytest.mark.parametrize(
    ("device", "words"), [("nonsense", "cuda:N"), ("meta", "cpu"), ("cuda:1", "GPU"), ("cuda:7", "GPU")]
)
def test_devices_that_cannot_be_used(device, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InvalidOptionError) as caught:
        detect(device)
    assert device in caught.value.what
    assert words in caught.value.why + caught.value.next_step


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_of_this_machine():
    found = detect("cuda")
    assert found.compute_capability == torch.cuda.get_device_capability()
    assert choose(found, "nf4").reasons
