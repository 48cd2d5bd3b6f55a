"""CUDA graphs by way of torch. All of them share one pool of memory: they run one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class CudaGraphs:
    """The backend of `graph` on NVIDIA GPUs."""

    def __init__(self) -> None:
        self._pool: Any = None
        # one for all captures: workspaces of libraries belong to a stream
        self._stream: torch.cuda.Stream | None = None
        self._done: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None

    def obstacle(self, tensor: torch.Tensor) -> str | None:
        """Graphs are for CUDA, and not inside another one."""
        if tensor.device.type != "cuda":
            return f"a {tensor.device.type} device has no CUDA graphs"
        return "another capture is under way" if torch.cuda.is_current_stream_capturing() else None

    def capture(self, work: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], torch.Tensor]:
        """Record what `work` queues; blocks that torch has cached are given back first."""
        with torch.cuda.device(device):
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            if self._stream is None or self._stream.device_index != torch.cuda.current_device():
                self._stream = torch.cuda.Stream()
            graph = torch.cuda.CUDAGraph()
            # other threads may use the GPU meanwhile
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                out = work()

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Wait for the stream that was used before, where it is another one.

        Inside somebody else's capture nothing is waited for: a graph cannot depend on what is not part of it.
        """
        if torch.cuda.is_current_stream_capturing():
            yield
            return
        stream = torch.cuda.current_stream()
        if self._done is not None and self._done[0] != stream:
            stream.wait_event(self._done[1])
        yield
        self._done = (stream, stream.record_event())

    def release(self) -> None:
        """The pool goes with the last graph, once the last replay is done; the next capture begins another."""
        if self._pool is None:
            return
        if self._done is not None:
            # the allocator knows the stream of the capture only, and may unmap what replays elsewhere still use
            self._done[1].synchronize()
        # cuBLAS keeps a workspace a stream, that of the captures in the pool, which could not go; others come anew
        torch._C._cuda_clearCublasWorkspaces()
        self._pool = None
