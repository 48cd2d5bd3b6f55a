"""One kind of graphics card: its memory, bandwidth, bus and peak rates."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gossamer.errors import InvalidOptionError
from gossamer.kernels.capability import Capability

# Bytes a second that one lane carries: 8, 16 and 32 GT/s in 128/130 code (PCI Express base specification).
LANE_BYTES = {3: 8e9 * 128 / 130 / 8, 4: 16e9 * 128 / 130 / 8, 5: 32e9 * 128 / 130 / 8}

# What the kernels are measured with, and so what a card that is not here is planned with.
ASSUMED_SOFTWARE = Capability(
    kind="cuda",
    name="planned",
    system="Linux",
    torch_version=(2, 11),
    cuda_version=(13, 0),
    cudnn_version=91900,
    triton="3.6.0",
    flash=True,
)


@dataclass(frozen=True)
class Card:
    """Rates are peaks in operations a second, dense, 0 where there are no such units. Those of fp16, bf16 and fp8 are
    with float32 sums, which is how torch multiplies: on GeForce cards half of what is usually quoted.

    `memory_bytes` is what programs can have of it: on GDDR with error correction 15/16 of what is built in. `here` is
    what a card that is in this machine can do with the software that is installed.
    """

    name: str
    memory_bytes: int
    compute_capability: tuple[int, int]
    bandwidth: float
    fp16: float
    bf16: float
    fp8: float
    int8: float
    fp32: float
    pcie: tuple[int, int]
    source: str
    aliases: tuple[str, ...] = ()
    here: Capability | None = None

    @property
    def bus(self) -> float:
        """Bytes a second of the bus to the host, one way, before anything is lost."""
        generation, lanes = self.pcie
        return LANE_BYTES[generation] * lanes

    @property
    def capability(self) -> Capability:
        """The card as the choice of backends sees it, with the software that is here, or else assumed."""
        if self.here is not None:
            return self.here
        return replace(
            ASSUMED_SOFTWARE,
            name=self.name,
            compute_capability=self.compute_capability,
            memory_bytes=self.memory_bytes,
        )

    def rate(self, compute: str) -> float:
        """Peak operations a second of products in a compute type."""
        rates = {"fp16": self.fp16, "bf16": self.bf16, "fp8": self.fp8, "int8": self.int8, "fp32": self.fp32}
        if not rates[compute]:
            raise InvalidOptionError(
                f"{self.name} has no {compute} units.", "So no time can be predicted.", "Use 'auto' as compute type."
            )
        return rates[compute]
