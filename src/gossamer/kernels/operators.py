"""When a kernel has to be called through its `gossamer::` operator, and when it may be launched directly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def lasting() -> Iterator[None]:
    """Tensors made inside may be written to later in any mode; those of inference mode only in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def through_operator(tensor: torch.Tensor) -> bool:
    """Whether a compiler, a tracer with tensors of its own or autograd has to see what happens to `tensor`.

    They see operators only: autograd refuses to differentiate one, and notices what it changed. Going through an
    operator costs the host some 20 us a call.
    """
    return (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack() > 0  # modes such as FakeTensorMode and make_fx
        or type(tensor) is not torch.Tensor
    )
