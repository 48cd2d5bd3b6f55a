"""Memory that there is to plan with."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Assumed, not measured here: what the CUDA context and its libraries take of a card, and what the system and other
# programs take of the host. A machine's own free memory is used where it can be asked.
GPU_RESERVE = 500_000_000
HOST_RESERVE = 2_000_000_000

# Assumed as well: what torch's allocator holds besides tensors, in gaps between them, and workspaces of libraries.
GAP_BYTES = 50_000_000
GAP_SHARE = 0.02  # of the tensors

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
        return max(0, int((self.gpu_limit - GAP_BYTES) / (1 + GAP_SHARE)))

    def gpu_for(self, tensors: int) -> int:
        """The GPU memory that it takes to have so much for tensors."""
        return math.ceil(tensors * (1 + GAP_SHARE)) + GAP_BYTES + self.gpu_reserve

    @property
    def host_free(self) -> int | None:
        """For the process."""
        return None if self.host is None else max(0, self.host - self.host_reserve)
