"""Bytes beyond the weights: what is alive at the worst moment of each phase, counted from the code that runs it.

A single block is the worst moment of a step (`models/flux/blocks.py`). In units of tokens x width, with activations of
a bytes and operands of o bytes:

    tokens a   normed rows o   one buffer of queries, keys, values and mlp 7 a   attended a   rows 5 o   result a
    tokens a   normed rows a   queries, keys, values 3 a   gelu(mlp) 4 a         attended a              result a

The second where operands are floats: the product takes GELU itself and reads its parts where they lie. At 1024x1024 and
512 text tokens that is 368 MB with fp8 products and 311 MB in bf16. Measured on one H200 with fp8: 0.37 GB beyond the
weights (LOG.md, 2026-11-20); in bf16 a test counts the tensors of a step. Decoded weights pass through one buffer of
the largest operand.
"""

from __future__ import annotations

import math

from gossamer.memory.model_cost import t5_linears
from gossamer.memory.model_specs import T5Spec, VaeSpec
from gossamer.memory.offload_strips import STRIP_POSITIONS
from gossamer.memory.picture import LATENT_SHRINK, Job
from gossamer.memory.placement import VaePlacement
from gossamer.models.flux_spec import MLP_RATIO, TIMESTEP_CHANNELS, FluxSpec

TYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}
CODES = ("fp8", "int8")

# `offload_strips` keeps two maps of the picture's size and the float32 copies of one strip. Bytes of a strip for each
# of its values, with 16-bit activations, as counted over the tensors of a run: at the last level, and where the map
# before it is doubled.
STRIP_BYTES = 13
STRIP_BYTES_DOUBLED = 25

# What libraries take, measured on one H200. cuDNN 9 for the largest convolution, times its result: it reorders operands
# that are not channels_last, which would make decoding 1.5 times slower. It gets by with less where it has to.
WORKSPACE = 2.5
CUBLAS_BYTES = 35_000_000

# the transformer ------------------------------------------------------------------------------------------------------


def step_bytes(spec: FluxSpec, job: Job, activations: str, compute: str) -> int:
    """Tokens and everything made from them at the worst moment of a step, inputs and rotation included."""
    wide, narrow = TYPE_BYTES[activations], TYPE_BYTES[compute]
    unit = job.batch * spec.width
    rows = narrow if compute in CODES else 0  # beside the values that they are made from
    single = unit * job.tokens * ((3 + MLP_RATIO + 3) * wide + narrow + (MLP_RATIO + 1) * rows)
    double = unit * (2 * job.tokens * wide + _feed_forward(job, wide, narrow, rows))
    worst = max(single if spec.num_single_layers else 0, double if spec.num_layers else 0)
    return worst + _input_bytes(spec, job, wide)


def captured_bytes(spec: FluxSpec, job: Job, activations: str) -> int:
    """What a captured step keeps besides: copies of inputs, rotation and vectors, a result, a workspace of cuBLAS."""
    return _input_bytes(spec, job, TYPE_BYTES[activations]) + vectors_bytes(spec, job, activations, 1) + CUBLAS_BYTES


def _input_bytes(spec: FluxSpec, job: Job, wide: int) -> int:
    """Image and text tokens, the result, and the rotation in float32."""
    inputs = job.batch * (job.text_tokens * spec.joint_attention_dim + 2 * job.image_tokens * spec.in_channels) * wide
    return inputs + 2 * job.tokens * (spec.attention_head_dim // 2) * 4


def _feed_forward(job: Job, wide: int, narrow: int, rows: int) -> int:
    """The larger stream's part of a double block: waiting residual, normed rows, hidden, rows and result."""
    tokens = max(job.image_tokens, job.text_tokens)
    return tokens * (wide + narrow + MLP_RATIO * (wide + rows) + wide)


def vectors_bytes(spec: FluxSpec, job: Job, activations: str, steps: int) -> int:
    """Modulation vectors of so many steps: six a stream of a double block, three a single block, two at the end."""
    vectors = 12 * spec.num_layers + 3 * spec.num_single_layers + 2
    return vectors * spec.width * TYPE_BYTES[activations] * job.batch * steps


def largest_operand_bytes(spec: FluxSpec, compute: str) -> int:
    """The buffer that decoded weights pass through: a single block's first product, or a double block's projections."""
    rows = (3 + MLP_RATIO) * spec.width if spec.num_single_layers else MLP_RATIO * spec.width
    columns = spec.width
    last = (MLP_RATIO + 1) * spec.width * spec.width if spec.num_single_layers else rows * columns
    return max(rows * columns, last) * TYPE_BYTES[compute]


def modulation_operand_bytes(spec: FluxSpec, activations: str) -> int:
    """The same for a modulation linear, whose products are not in eight bits."""
    vectors = 6 if spec.num_layers else 3
    return max(vectors * spec.width, TIMESTEP_CHANNELS) * spec.width * TYPE_BYTES[activations]


# text encoders --------------------------------------------------------------------------------------------------------


def t5_step_bytes(spec: T5Spec, job: Job, activations: str) -> int:
    """Scores once in the type of the activations and twice in float32, and 14 tensors of tokens x width."""
    wide = TYPE_BYTES[activations]
    scores = spec.heads * job.text_tokens**2 * (wide + 2 * 4)
    return job.batch * (scores + 14 * job.text_tokens * spec.width * wide)


def t5_operand_bytes(spec: T5Spec, activations: str) -> int:
    """The buffer that decoded weights of a T5 encoder pass through."""
    return max(map(math.prod, t5_linears(spec))) * TYPE_BYTES[activations]


# the VAE --------------------------------------------------------------------------------------------------------------


def vae_step_bytes(spec: VaeSpec, job: Job, placement: VaePlacement, activations: str) -> int:
    """Tensors of decoding a picture, whole or strip by strip."""
    wide = TYPE_BYTES[activations]
    latents = spec.latent * job.pixels // LATENT_SHRINK**2 * wide
    if placement == "whole":
        return job.batch * (job.pixels * _values_a_pixel(spec) * wide + latents)
    last, before = spec.channels[:2]
    full = job.pixels * 2 * last * wide + STRIP_POSITIONS * last * STRIP_BYTES
    half = job.pixels * before // 4 * wide + STRIP_POSITIONS * before * STRIP_BYTES_DOUBLED
    return job.batch * (max(full, half) + latents)


def vae_peak_bytes(spec: VaeSpec, job: Job, placement: VaePlacement, activations: str) -> int:
    """The same with cuDNN's workspace, which is largest for the last convolution after sides were doubled."""
    tensors = vae_step_bytes(spec, job, placement, activations)
    if placement == "tiled" or len(spec.channels) < 2:
        return tensors
    channels = spec.channels[1]
    doubled = math.ceil(channels / 4 + (2 + WORKSPACE) * channels)  # a pixel of the picture: before, around, and beside
    return max(tensors, job.batch * job.pixels * doubled * TYPE_BYTES[activations])


def _values_a_pixel(spec: VaeSpec) -> int:
    """Values alive for each pixel of the picture, at the worst of all levels.

    A level begins with its input, which stays to its end, the norm of it and the activation; ends with four results of
    a residual block beside the input; or doubles its sides, with the values before and after the convolution.
    """
    levels = list(reversed(spec.channels))
    worst, before = 0, levels[0]
    for place, channels in enumerate(levels):
        area = 4 ** (len(levels) - 1 - place)  # pixels of the picture for each of this level
        upsampled = before + channels + 2 * 4 * channels if place < len(levels) - 1 else 0
        worst = max(worst, math.ceil(max(3 * before, before + 4 * channels, upsampled) / area))
        before = channels
    return worst
