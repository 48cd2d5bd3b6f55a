"""What `fits` is compared with: the ways of diffusers to run FLUX.1-dev in little memory, one transformer step each.

    sequential     accelerate's offload of every layer, bf16           (enable_sequential_cpu_offload)
    group          leaf level with a stream of its own, bf16           (enable_group_offload)
    model          the whole transformer comes, GGUF Q8_0              (enable_model_cpu_offload)

Only the transformer is there, and only its step is measured: in a pipeline, text encoders and VAE come on top.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import flux_step_peers as peers
from gossamer.bench.random_flux import Workload, put, random_tensor, step_inputs, weight_shapes
from gossamer.bench.timing import Repeats, Timing, measure, release_memory


def sequential(work: Workload, repeats: Repeats) -> Timing:
    """Every layer is copied when it is called, and waited for."""
    from accelerate import cpu_offload

    model = on_host(work)
    cpu_offload(model, work.device)
    return timed(model, work, repeats)


def group(work: Workload, repeats: Repeats) -> Timing:
    """Every layer is copied ahead on a stream, from pinned memory."""
    model = on_host(work)
    model.enable_group_offload(
        onload_device=work.device, offload_device=torch.device("cpu"), offload_type="leaf_level", use_stream=True
    )
    return timed(model, work, repeats)


def whole(work: Workload, repeats: Repeats) -> Timing:
    """The model comes as a whole when it is called first, its blocks decoded at every call."""
    from accelerate import cpu_offload_with_hook

    model = packed_on_host(work)
    release_memory(work.device)
    cpu_offload_with_hook(model, work.device)
    return timed(model, work, repeats)


PEERS: dict[str, Callable[[Workload, Repeats], Timing]] = {
    "diffusers-sequential/bf16": sequential,
    "diffusers-group/bf16": group,
    "diffusers-model/Q8_0": whole,
}


def on_host(work: Workload) -> Any:
    """diffusers' transformer in bf16 in host memory; its values are made on the GPU, tensor by tensor."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(work.config)
    for name, shape in weight_shapes(work.spec).items():
        put(model, name, random_tensor(name, shape, work).cpu())
    return model.eval()


def packed_on_host(work: Workload) -> Any:
    """diffusers' transformer with GGUF blocks in host memory."""
    return nn.Module.to(peers.gguf(work, "Q8_0"), "cpu")


@torch.no_grad()
def timed(model: Any, work: Workload, repeats: Repeats) -> Timing:
    """Steps of the model, and the most that it took of the GPU in them, inputs included."""
    inputs = step_inputs(work)
    release_memory(work.device)
    return measure(lambda: model(**inputs, return_dict=False)[0], work.device, repeats, 0)
