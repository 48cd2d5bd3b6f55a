"""A FLUX.1 transformer on random weights, the same in every process: values follow from a tensor's name and device.

    linear weights and biases   normal, of the workload's standard deviation (0.02 at full size), rounded to bf16
    norm scales                 1 + the same
    adapters                    down and up of every linear inside a block likewise, in bf16, multiplier 1

Random weights are as fast as trained ones, and any layer can be made alone, straight on the GPU.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gossamer.adapters import Adapter, LowRankTerm
from gossamer.models.flux_spec import FluxSpec, Shape, linear_shapes, norm_shapes

BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")

# Ranks of the adapters that are attached at once.
ADAPTERS: Mapping[str, tuple[int, ...]] = {"none": (), "r16": (16,), "r64": (64,), "4xr16": (16, 16, 16, 16)}

FLUX_DEV: Mapping[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
TINY: Mapping[str, Any] = {
    **FLUX_DEV,
    "num_layers": 1,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "joint_attention_dim": 256,
    "pooled_projection_dim": 64,
}


@dataclass(frozen=True)
class Workload:
    """One denoising step: a model with weights of a standard deviation, a square picture of `side` pixels, batch 1."""

    name: str
    config: Mapping[str, Any]
    std: float
    side: int
    text_tokens: int
    device: torch.device

    @property
    def spec(self) -> FluxSpec:
        """The model's sizes."""
        return FluxSpec.from_config(self.config)


def full_size(device: torch.device) -> Workload:
    """FLUX.1-dev, 1024x1024, 4096 image and 512 text tokens."""
    return Workload("FLUX.1-dev, 1024x1024", FLUX_DEV, 0.02, 1024, 512, device)


def tiny(device: torch.device) -> Workload:
    """Three blocks of width 256, 64x64: to try the benchmark itself. Its weights are larger, or it would do nothing."""
    return Workload("three small blocks, 64x64", TINY, 0.07, 64, 8, device)


# weights --------------------------------------------------------------------------------------------------------------


def random_tensor(name: str, shape: Sequence[int], work: Workload) -> torch.Tensor:
    """The bf16 tensor of that name."""
    return _normal(name, shape, work.device, 1.0 if ".norm_" in name else 0.0, work.std)


def _normal(name: str, shape: Sequence[int], device: torch.device, mean: float, std: float) -> torch.Tensor:
    values = torch.empty(tuple(shape), dtype=torch.bfloat16, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return values.normal_(mean, std, generator=generator)


def weight_shapes(spec: FluxSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by its diffusers name."""
    linears = linear_shapes(spec)
    weights: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in linears.items()}
    biases: dict[str, tuple[int, ...]] = {f"{name}.bias": (shape[0],) for name, shape in linears.items()}
    return {**weights, **biases, **norm_shapes(spec)}


def block_linears(spec: FluxSpec) -> dict[str, Shape]:
    """(out, in) of every linear inside a block, its modulation included."""
    return {name: shape for name, shape in linear_shapes(spec).items() if name.startswith(BLOCKS)}


def fill(model: nn.Module, work: Workload, dtype: torch.dtype = torch.bfloat16) -> None:
    """Give a model on the meta device its weights."""
    for name, shape in weight_shapes(work.spec).items():
        put(model, name, random_tensor(name, shape, work).to(dtype))


def put(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Replace one parameter, which may be on the meta device."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Parameter(value, requires_grad=False))


def random_adapters(work: Workload, kind: str) -> tuple[Adapter, ...]:
    """The adapters of an entry of ADAPTERS, each on every linear inside a block."""
    return tuple(_adapter(work, place, rank) for place, rank in enumerate(ADAPTERS[kind]))


def _adapter(work: Workload, place: int, rank: int) -> Adapter:
    terms = {}
    for name, (out_features, in_features) in block_linears(work.spec).items():
        down = random_tensor(f"{name}.down.{place}.{rank}", (rank, in_features), work)
        up = random_tensor(f"{name}.up.{place}.{rank}", (out_features, rank), work)
        terms[name] = LowRankTerm(down, up)
    return Adapter(work.spec, terms)


def adapter_bytes(adapters: Sequence[Adapter]) -> int:
    """Bytes of all factors."""
    return sum(term.nbytes for adapter in adapters for term in adapter.terms.values())


# one step -------------------------------------------------------------------------------------------------------------


def step_inputs(work: Workload, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Keyword arguments of the forward; made in bf16, so that every type sees the same values.

    Guidance is 4 and the timestep 0.5, because a thousand times either is a bf16 number; 3500 would become 3504.
    """
    rows = work.side // 16  # a token is 2x2 latents of 8x8 pixels
    config, device = work.config, work.device
    normal = {
        "hidden_states": (1, rows * rows, config["in_channels"]),
        "encoder_hidden_states": (1, work.text_tokens, config["joint_attention_dim"]),
        "pooled_projections": (1, config["pooled_projection_dim"]),
    }
    inputs = {name: _normal(name, shape, device, 0.0, 1.0).to(dtype) for name, shape in normal.items()}
    places = torch.arange(rows, device=device, dtype=dtype)
    image_ids = torch.zeros(rows, rows, 3, device=device, dtype=dtype)
    image_ids[..., 1], image_ids[..., 2] = places[:, None], places[None, :]
    return {
        **inputs,
        "timestep": torch.tensor([0.5], device=device, dtype=dtype),
        "guidance": torch.tensor([4.0], device=device, dtype=torch.float32),
        "img_ids": image_ids.view(-1, 3),
        "txt_ids": torch.zeros(work.text_tokens, 3, device=device, dtype=dtype),
    }


@torch.no_grad()
def reference(work: Workload, kind: str) -> torch.Tensor:
    """diffusers' own forward in float32 without TF32, adapters merged into the weights: what every row is held to."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(work.config)
    fill(model, work, torch.float32)
    with _full_float32():
        for adapter in random_adapters(work, kind):
            for name, term in adapter.terms.items():
                assert isinstance(term, LowRankTerm)  # as `_adapter` makes them
                model.get_parameter(f"{name}.weight").addmm_(term.up.float(), term.down.float())
        result: torch.Tensor = model(**step_inputs(work, torch.float32), return_dict=False)[0]
    return result


@contextmanager
def _full_float32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
