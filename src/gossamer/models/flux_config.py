"""The config of a FLUX.1 transformer from the names and shapes of its weights, for files that bring no config.

    in_channels, width      x_embedder.weight (width, in_channels)
    joint_attention_dim     context_embedder.weight (width, joint_attention_dim)
    pooled_projection_dim   time_text_embed.text_embedder.linear_1.weight (width, pooled_projection_dim)
    out_channels            proj_out.weight (out_channels, width)
    attention_head_dim      the first norm scale of queries (attention_head_dim,)
    guidance_embeds         whether there is a guidance embedder: dev has one, schnell has none

No weight says how positions are spread over the channels of a head: `axes` does, where it is not FLUX.1's own way.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from gossamer.errors import WrongModelError

FLUX_AXES = (16, 56, 56)  # channels of a head for the frame, the row and the column of a token
FIRST_NORMS = ("transformer_blocks.0.attn.norm_q.weight", "single_transformer_blocks.0.attn.norm_q.weight")
GUIDANCE = "time_text_embed.guidance_embedder."
BLOCK = re.compile(r"(?P<kind>transformer_blocks|single_transformer_blocks)\.(?P<i>\d+)\.")


class Weights(Protocol):
    """Canonical names of a transformer's tensors, and the shape of each."""

    @property
    def names(self) -> frozenset[str]:
        """Every name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one."""


def config_from_weights(weights: Weights, axes: Sequence[int] = FLUX_AXES) -> dict[str, Any]:
    """The config of the model that these weights make up; `axes` must fill a head."""
    width, in_channels = _matrix(weights, "x_embedder.weight")
    double, single = count_blocks(weights.names)
    head = _head_dim(weights, width)
    if sum(axes) != head:
        raise WrongModelError(
            f"The checkpoint holds a transformer with heads of {head} channels.",
            f"FLUX.1 has heads of {sum(FLUX_AXES)}, and weights do not tell how positions are spread over others.",
            "Name a base model of the same sizes: its config tells.",
        )
    return {
        "patch_size": 1,
        "in_channels": in_channels,
        "out_channels": _matrix(weights, "proj_out.weight")[0],
        "num_layers": double,
        "num_single_layers": single,
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": _matrix(weights, "context_embedder.weight")[1],
        "pooled_projection_dim": _matrix(weights, "time_text_embed.text_embedder.linear_1.weight")[1],
        "guidance_embeds": any(name.startswith(GUIDANCE) for name in weights.names),
        "axes_dims_rope": tuple(axes),
    }


def count_blocks(names: Iterable[str]) -> tuple[int, int]:
    """Double and single blocks that canonical names speak of."""
    counts = {"transformer_blocks": 0, "single_transformer_blocks": 0}
    for name in names:
        if match := BLOCK.match(name):
            counts[match["kind"]] = max(counts[match["kind"]], int(match["i"]) + 1)
    return counts["transformer_blocks"], counts["single_transformer_blocks"]


def axes_of(config: Mapping[str, Any]) -> tuple[int, ...]:
    """How a config spreads positions over the channels of a head."""
    return tuple(config.get("axes_dims_rope", FLUX_AXES))


def _head_dim(weights: Weights, width: int) -> int:
    name = next((norm for norm in FIRST_NORMS if norm in weights.names), FIRST_NORMS[0])
    shape = _shape(weights, name)
    if len(shape) != 1 or not shape[0] or width % shape[0]:
        raise _wrong_shape(name, shape, f"a scale for each channel of a head, of which {width} is a multiple")
    return shape[0]


def _matrix(weights: Weights, name: str) -> tuple[int, int]:
    shape = _shape(weights, name)
    if len(shape) != 2 or not all(shape):
        raise _wrong_shape(name, shape, "a matrix")
    return shape[0], shape[1]


def _shape(weights: Weights, name: str) -> tuple[int, ...]:
    if name not in weights.names:
        raise WrongModelError(
            "The checkpoint is not a whole FLUX.1 transformer.",
            f"It lacks {name!r} (by its name in diffusers), from which the sizes of the model follow.",
            "Use a file that holds the whole transformer.",
        )
    return weights.shape(name)


def _wrong_shape(name: str, shape: tuple[int, ...], expected: str) -> WrongModelError:
    return WrongModelError(
        "The checkpoint is not a FLUX.1 transformer.",
        f"{name!r} (by its name in diffusers) has the shape {shape}; {expected} was expected.",
        "Use a FLUX.1 model.",
    )
