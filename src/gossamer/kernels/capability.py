"""What a machine can multiply: facts by chip generation, as data, and one record for one machine.

Nothing here asks the machine anything (`detect` does), so a choice for any chip can be computed on any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["cuda", "rocm", "mps", "cpu"]


@dataclass(frozen=True)
class Generation:
    """A family of chips, and the operand types that its matrix units multiply.

    `first` and `last` are compute capabilities, both included. `int8` and `fp8` mean units that torch can reach.
    """

    name: str
    fp16: bool
    bf16: bool
    int8: bool
    fp8: bool
    first: tuple[int, int] = (0, 0)
    last: tuple[int, int] = (0, 0)


# CUDA C++ Programming Guide, "Compute Capabilities", table of tensor core input types. 7.2 (Xavier) has int8 units too,
# but torch ships no binaries for it.
CUDA_GENERATIONS = (
    Generation("before Volta", fp16=False, bf16=False, int8=False, fp8=False, first=(0, 0), last=(6, 9)),
    Generation("Volta", fp16=True, bf16=False, int8=False, fp8=False, first=(7, 0), last=(7, 4)),
    Generation("Turing", fp16=True, bf16=False, int8=True, fp8=False, first=(7, 5), last=(7, 9)),
    Generation("Ampere", fp16=True, bf16=True, int8=True, fp8=False, first=(8, 0), last=(8, 8)),
    Generation("Ada", fp16=True, bf16=True, int8=True, fp8=True, first=(8, 9), last=(8, 9)),
    Generation("Hopper", fp16=True, bf16=True, int8=True, fp8=True, first=(9, 0), last=(9, 9)),
    Generation("Blackwell", fp16=True, bf16=True, int8=True, fp8=True, first=(10, 0), last=(12, 9)),
)

# What every generation since Ampere has had; nothing is assumed about the eight-bit units of a chip that came later.
LATER = Generation("newer than Blackwell", fp16=True, bf16=True, int8=False, fp8=False)

OTHERS = {
    "rocm": Generation("AMD", fp16=True, bf16=True, int8=False, fp8=False),
    "mps": Generation("Apple", fp16=True, bf16=True, int8=False, fp8=False),
    "cpu": Generation("CPU", fp16=False, bf16=False, int8=False, fp8=False),
}


@dataclass(frozen=True)
class Capability:
    """One device, and the libraries around it, as far as the choice of a backend depends on them.

    `triton` and `triton_obstacle` say whether Triton kernels can run: the version, or else why not. `flash` is whether
    torch was built with flash attention. Unknown facts are None, and so is the compute capability of AMD devices, whose
    numbers mean something else.
    """

    kind: Kind
    name: str
    system: str
    torch_version: tuple[int, int]
    compute_capability: tuple[int, int] | None = None
    cuda_version: tuple[int, int] | None = None
    cudnn_version: int | None = None
    triton: str | None = None
    triton_obstacle: str | None = None
    flash: bool = False
    memory_bytes: int | None = None

    @property
    def generation(self) -> Generation:
        """The facts about this family of chips."""
        if self.kind != "cuda" or self.compute_capability is None:
            return OTHERS[self.kind]
        for generation in CUDA_GENERATIONS:
            if generation.first <= self.compute_capability <= generation.last:
                return generation
        return LATER

    @property
    def chip(self) -> str:
        """How reasons call the device: `Turing (7.5)`, `CPU`."""
        if self.kind != "cuda" or self.compute_capability is None:
            return self.generation.name
        return f"{self.generation.name} ({self.compute_capability[0]}.{self.compute_capability[1]})"
