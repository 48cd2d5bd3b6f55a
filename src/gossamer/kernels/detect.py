"""Reads the machine: which device there is, and the libraries around it."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from gossamer.errors import InvalidOptionError
from gossamer.kernels.capability import Capability, Kind


def detect(device: torch.device | str | None = None) -> Capability:
    """The capability of a device; without one, of the fastest kind that torch can use here."""
    chosen = _parse(_fastest() if device is None else device)
    if chosen.type == "cuda":
        return _cuda(chosen)
    if chosen.type == "mps" and torch.backends.mps.is_available():
        return _without_cuda("mps", f"Apple {platform.machine()}", torch.mps.recommended_max_memory())
    if chosen.type == "cpu":
        return _without_cuda("cpu", platform.processor() or platform.machine(), _host_memory_bytes())
    raise InvalidOptionError(
        f"The device {str(chosen)!r} cannot be used here.",
        "Backends can be chosen for cuda (NVIDIA and AMD), mps (Apple, where torch finds it) and cpu.",
        "Use one of these devices.",
    )


def _parse(device: torch.device | str) -> torch.device:
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise InvalidOptionError(
            f"There is no device called {device!r}.", "Devices are cpu, mps, cuda and cuda:N.", "Use one of these."
        ) from error


def _fastest() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _cuda(device: torch.device) -> Capability:
    """torch calls AMD devices `cuda` as well; their compute capability is a gfx number and means something else."""
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise InvalidOptionError(
            f"The device {str(device)!r} cannot be used here.",
            f"torch finds {count} GPUs here, counted from 0." if count else "torch finds no GPU here.",
            "Use another device, or 'cpu'.",
        )
    properties = torch.cuda.get_device_properties(device)
    rocm = torch.version.hip is not None
    triton, obstacle = _triton()
    return Capability(
        kind="rocm" if rocm else "cuda",
        name=properties.name,
        system=platform.system(),
        torch_version=_two_numbers(torch.__version__),
        compute_capability=None if rocm else (properties.major, properties.minor),
        cuda_version=_two_numbers(torch.version.cuda) if torch.version.cuda else None,
        cudnn_version=None if rocm else torch.backends.cudnn.version(),
        triton=triton,
        triton_obstacle=obstacle,
        flash=torch.backends.cuda.is_flash_attention_available(),
        memory_bytes=properties.total_memory,
    )


def _without_cuda(kind: Kind, name: str, memory_bytes: int | None) -> Capability:
    return Capability(
        kind=kind,
        name=name,
        system=platform.system(),
        torch_version=_two_numbers(torch.__version__),
        triton_obstacle=f"Triton kernels run on GPUs of NVIDIA only, and this device is {kind}",
        memory_bytes=memory_bytes,
    )


def _triton() -> tuple[str | None, str | None]:
    """The version of Triton, or else why its kernels cannot run here.

    Triton compiles a small launcher in C beside each kernel; `triton-windows` brings a compiler of its own.
    """
    if find_spec("triton") is None:
        return None, "the package `triton` is not installed (on Windows it is called `triton-windows`)"
    if platform.system() != "Windows" and not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))):
        return None, "Triton needs a C compiler for its launchers, and neither cc, gcc nor clang is there"
    for package in ("triton", "triton-windows"):
        try:
            return version(package), None
        except PackageNotFoundError:
            continue
    return "of unknown version", None


def _two_numbers(text: str) -> tuple[int, int]:
    """Major and minor of a version: `2.13.0+cpu` is (2, 13)."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _host_memory_bytes() -> int | None:
    """Physical memory; Windows has no such call, and nothing is chosen by it."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
