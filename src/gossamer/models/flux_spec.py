"""Names and sizes of FLUX.1's linears and norm scales as data, under their diffusers names.

W is the width (heads x head size). A double block holds two streams, image and text, of six linears each besides the
modulation; a single block holds one stream.

    x_embedder  (W, in_channels)    context_embedder (W, joint)     proj_out (patch^2 out_channels, W)
    timestep, guidance embedder     (W, 256) then (W, W)            text embedder (W, pooled) then (W, W)
    modulation  double (6 W, W)     single (3 W, W)                 norm_out (2 W, W)
    attention   q, k, v, out (W, W) feed-forward (4 W, W), (W, 4 W) single's proj_out (W, 5 W): attention, then mlp
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from gossamer.errors import WrongModelError

TIMESTEP_CHANNELS = 256  # sinusoids that the timestep and guidance embedders read
MLP_RATIO = 4

# Linears that published GGUF files of FLUX.1 keep in bf16 or fp32: small, and every token or every block reads them.
SENSITIVE: tuple[str, ...] = ("x_embedder", "context_embedder", "time_text_embed.*", "norm_out.linear", "proj_out")

# Linears whose vectors scale and gate every token of a block. Read once a run, they can have eight bits at no cost: the
# forward error of a random FLUX.1-dev in NF4 with fp8 products falls from 0.346 to 0.283 that way.
MODULATION = "*.norm*.linear"
MODULATION_STORAGE = "Q8_0"  # wherever the other linears of the blocks are quantised

REQUIRED = (
    "num_layers",
    "num_single_layers",
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "joint_attention_dim",
    "pooled_projection_dim",
    "guidance_embeds",
)


def is_modulation(name: str) -> bool:
    """Whether a linear of that name gives the vectors of a block."""
    return fnmatchcase(name, MODULATION)


@dataclass(frozen=True)
class FluxSpec:
    """What a FLUX.1 transformer's sizes follow from; the fields of its diffusers config."""

    num_layers: int
    num_single_layers: int
    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    out_channels: int
    joint_attention_dim: int
    pooled_projection_dim: int
    guidance_embeds: bool
    patch_size: int = 1

    @property
    def width(self) -> int:
        """Features of one token inside the blocks."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FluxSpec:
        """The spec of a diffusers FluxTransformer2DModel config."""
        missing = [name for name in REQUIRED if name not in config]
        if missing:
            raise WrongModelError(
                "This is not the config of a FLUX.1 transformer.",
                f"It says nothing of {', '.join(missing)}.",
                "Use a FLUX.1 model in the diffusers layout.",
            )
        return cls(
            **{name: config[name] for name in REQUIRED},
            out_channels=config.get("out_channels") or config["in_channels"],
            patch_size=config.get("patch_size", 1),
        )


Shape = tuple[int, int]


def linear_shapes(spec: FluxSpec) -> dict[str, Shape]:
    """(out, in) of every linear by its diffusers name."""
    double, single = _double_block(spec.width), _single_block(spec.width)
    return {
        **_embedders(spec),
        **{f"transformer_blocks.{i}.{name}": shape for i in range(spec.num_layers) for name, shape in double.items()},
        **{
            f"single_transformer_blocks.{i}.{name}": shape
            for i in range(spec.num_single_layers)
            for name, shape in single.items()
        },
        "norm_out.linear": (2 * spec.width, spec.width),
        "proj_out": (spec.patch_size**2 * spec.out_channels, spec.width),
    }


def norm_shapes(spec: FluxSpec) -> dict[str, tuple[int]]:
    """Shape of every query and key norm scale by its diffusers name: one value per channel of a head."""
    double = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    names = [f"transformer_blocks.{i}.attn.{norm}.weight" for i in range(spec.num_layers) for norm in double]
    names += [
        f"single_transformer_blocks.{i}.attn.{norm}.weight"
        for i in range(spec.num_single_layers)
        for norm in ("norm_q", "norm_k")
    ]
    return dict.fromkeys(names, (spec.attention_head_dim,))


def _embedders(spec: FluxSpec) -> dict[str, Shape]:
    width = spec.width
    first_inputs = {"timestep_embedder": TIMESTEP_CHANNELS, "text_embedder": spec.pooled_projection_dim}
    if spec.guidance_embeds:
        first_inputs["guidance_embedder"] = TIMESTEP_CHANNELS
    shapes = {"x_embedder": (width, spec.in_channels), "context_embedder": (width, spec.joint_attention_dim)}
    for name, inputs in first_inputs.items():
        shapes[f"time_text_embed.{name}.linear_1"] = (width, inputs)
        shapes[f"time_text_embed.{name}.linear_2"] = (width, width)
    return shapes


def _double_block(width: int) -> dict[str, Shape]:
    attention = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    return {
        **dict.fromkeys(("norm1.linear", "norm1_context.linear"), (6 * width, width)),
        **{f"attn.{name}": (width, width) for name in attention},
        **dict.fromkeys(("ff.net.0.proj", "ff_context.net.0.proj"), (MLP_RATIO * width, width)),
        **dict.fromkeys(("ff.net.2", "ff_context.net.2"), (width, MLP_RATIO * width)),
    }


def _single_block(width: int) -> dict[str, Shape]:
    return {
        "norm.linear": (3 * width, width),
        **{f"attn.{name}": (width, width) for name in ("to_q", "to_k", "to_v")},
        "proj_mlp": (MLP_RATIO * width, width),
        "proj_out": (width, (MLP_RATIO + 1) * width),
    }
