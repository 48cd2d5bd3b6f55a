"""Whole pictures by diffusers' pipeline in little memory, beside those of `fits`: what all of it takes of the GPU.

    sequential-picture     enable_sequential_cpu_offload, everything in bf16
    group-picture          enable_group_offload, leaf level with a stream of its own, everything in bf16
    model-picture          enable_model_cpu_offload, transformer in GGUF Q8_0, the rest in bf16

The same parts with the same random values as ours, text encoders in bf16 as diffusers loads them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import FluxPipeline

from fits_peers import on_host, packed_on_host
from fits_pipeline import PROMPT, Model, other_parts, small_parts
from gossamer.bench.timing import release_memory, wait
from gossamer.memory.gpu_memory import peak_bytes, reset_peak

Row = dict[str, Any]


def sequential(model: Model) -> Any:
    """Every layer is copied when it is called, and waited for."""
    pipe = pipeline_of(model, on_host(model.work))
    pipe.enable_sequential_cpu_offload(device=model.work.device)
    return pipe


def group(model: Model) -> Any:
    """Every layer is copied ahead on a stream, from pinned memory."""
    pipe = pipeline_of(model, on_host(model.work))
    pipe.enable_group_offload(
        onload_device=model.work.device,
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
        use_stream=True,
    )
    return pipe


def whole(model: Model) -> Any:
    """Every model comes as a whole when it is called, and leaves for the next."""
    pipe = pipeline_of(model, packed_on_host(model.work))
    pipe.enable_model_cpu_offload(device=model.work.device)
    return pipe


PICTURES: dict[str, Callable[[Model], Any]] = {
    "diffusers-sequential-picture/bf16": sequential,
    "diffusers-group-picture/bf16": group,
    "diffusers-model-picture/Q8_0": whole,
}


def pipeline_of(model: Model, transformer: Any) -> Any:
    """diffusers' pipeline over a transformer, with everything in host memory."""
    others = {name: module.to("cpu") for name, module in other_parts(model)}
    release_memory(model.work.device)
    return FluxPipeline(**small_parts(), **others, transformer=transformer)


def painted(pipe: Any, model: Model, steps: int) -> Row:
    """A picture of a few steps: seconds of a step from the second on, of all, and the most that everything took."""
    device, side, ends = model.work.device, model.work.side, []

    def after_step(pipeline: object, step: int, timestep: object, tensors: Row) -> Row:
        wait(device)
        ends.append(time.perf_counter())
        return tensors

    release_memory(device)
    reset_peak(device)
    started = time.perf_counter()
    size = {"height": side, "width": side, "max_sequence_length": model.spec.text_tokens}
    pipe(PROMPT, num_inference_steps=steps, guidance_scale=3.5, callback_on_step_end=after_step, **size)
    wait(device)
    return {
        "steps": steps,
        "step_seconds": (ends[-1] - ends[0]) / (len(ends) - 1),
        "picture_seconds": time.perf_counter() - started,
        "peak_bytes": peak_bytes(device),
    }
