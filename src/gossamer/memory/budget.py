"""Memory that there is to plan with."""

from __future__ import annotations

from dataclasses import dataclass

# Assumed, not measured here: what the CUDA context and its libraries take of a card, and what the system and other
# programs take of the host. A machine's own free memory is used where it can be asked.
GPU_RESERVE = 500_000_000
HOST_RESERVE = 2_000_000_000

# What torch's allocator holds besides tensors, in gaps between them: on one H200, under caps of 1.5 to 5.5 GB, it ran
# out with 0.06 to 0.12 GB of them where segments may grow (see `gpu_memory.capped`), with 0.19 to 0.29 where not.
GAP_BYTES = 150_000_000

# The process itself: 0.54 GB after importing torch, diffusers and transformers on a CPU, and what CUDA adds (assumed).
HOST_BASE = 1_500_000_000


@dataclass(frozen=True)
class Budget:
    """Bytes on the GPU, on the host and on disk. None where nobody knows, and nothing is refused for it."""

    gpu: int
    host: int | None = None
    disk: int | None = None
    gpu_reserve: int = GPU_RESERVE
    host_reserve: int = HOST_RESERVE

    @property
    def gpu_limit(self) -> int:
        """For the allocator."""
        return max(0, self.gpu - self.gpu_reserve)

    @property
    def gpu_free(self) -> int:
        """For tensors."""
        return max(0, self.gpu_limit - GAP_BYTES)

    def gpu_for(self, tensors: int) -> int:
        """The GPU memory that it takes to have so much for tensors."""
        return tensors + GAP_BYTES + self.gpu_reserve

    @property
    def host_free(self) -> int | None:
        """For the process."""
        return None if self.host is None else max(0, self.host - self.host_reserve)
