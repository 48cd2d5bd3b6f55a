"""What one denoising step does, counted: operations and bytes, from sizes alone.

linears      2 x weights x tokens; a double block's two streams see their own tokens
attention    4 x width x tokens^2 a block: scores and values, 2 each
pointwise    bytes that norms, gates, RoPE, GELU and quantisation read and write (`models/flux/blocks.py`)
decoding     stored bytes read and operands written, of everything that is not multiplied as it is stored
"""

from __future__ import annotations

from gossamer.memory.activations import TYPE_BYTES
from gossamer.memory.model_cost import TransformerBytes
from gossamer.memory.model_specs import T5Spec, VaeSpec
from gossamer.memory.picture import Job
from gossamer.memory.placement import VaePlacement
from gossamer.models.flux_spec import MLP_RATIO, FluxSpec

STRIP_WORK = 2.2  # what is computed again in strips, times the whole; counted for FLUX's decoder (`offload_strips`)


def linear_operations(spec: FluxSpec, job: Job) -> float:
    """Multiplications and additions of the linears inside the blocks, modulation left out."""
    stream = (4 + 2 * MLP_RATIO) * spec.width**2  # weights of one stream of a double block, and of a single block
    double = spec.num_layers * stream * job.tokens
    single = spec.num_single_layers * (3 + MLP_RATIO + MLP_RATIO + 1) * spec.width**2 * job.tokens
    return 2.0 * job.batch * (double + single)


def attention_operations(spec: FluxSpec, job: Job) -> float:
    """Of the attention of all blocks."""
    return 4.0 * job.batch * (spec.num_layers + spec.num_single_layers) * spec.width * job.tokens**2


def pointwise_bytes(spec: FluxSpec, job: Job, activations: str, compute: str) -> float:
    """Read and written by everything between the products."""
    wide, narrow = TYPE_BYTES[activations], TYPE_BYTES[compute]
    norm = 3 * wide + narrow  # tokens and waiting residual read, tokens and normed rows written
    rope = 4 * wide  # queries and keys, read and written
    single = norm + rope + (1 + MLP_RATIO) * (wide + narrow)
    quantise = wide + narrow if compute != activations else 0
    double = 2 * norm + rope + MLP_RATIO * (wide + narrow) + quantise
    blocks = spec.num_layers * double + spec.num_single_layers * single
    return float(blocks) * job.batch * job.tokens * spec.width


def block_weights(spec: FluxSpec) -> int:
    """Weights of the linears inside the blocks, modulation left out."""
    double = 2 * (4 + 2 * MLP_RATIO) * spec.width**2
    return spec.num_layers * double + spec.num_single_layers * (4 + 2 * MLP_RATIO) * spec.width**2


def modulation_weights(spec: FluxSpec) -> int:
    """Weights of the modulation linears inside the blocks."""
    return (12 * spec.num_layers + 3 * spec.num_single_layers) * spec.width**2


def decoded_bytes(weights: TransformerBytes, storage: str, compute: str) -> float:
    """Stored bytes read and operands written for the block weights of one format; nothing where it is the operand."""
    if storage == compute:
        return 0.0
    count = weights.storages[storage]
    share = count / sum(weights.storages.values())
    return sum(weights.blocks) * share + count * TYPE_BYTES[compute]


def modulation_bytes(spec: FluxSpec, weights: TransformerBytes, activations: str) -> float:
    """Bytes moved for the modulation linears: read once by a product, and decoded before where they have to be."""
    operand = modulation_weights(spec) * TYPE_BYTES[activations]
    return float(operand if weights.modulation_storage == activations else weights.modulation + 2 * operand)


def t5_operations(spec: T5Spec, job: Job, linear_weights: int) -> float:
    """Of one pass of a T5 encoder whose linears have so many weights in all."""
    attention = 4.0 * spec.layers * spec.heads * spec.head_size * job.text_tokens**2
    return job.batch * (2.0 * linear_weights * job.text_tokens + attention)


def vae_operations(spec: VaeSpec, job: Job, placement: VaePlacement) -> float:
    """Of decoding, as convolutions: 18 x channels in x channels out a pixel of their level; attention in the middle."""
    levels = list(reversed(spec.channels))
    deepest = float(4 ** (len(levels) - 1))
    middle = levels[0]
    total = 18.0 * (spec.latent * middle + 4 * middle**2) / deepest
    if spec.middle_attention:
        total += (8.0 * middle**2 + 4.0 * middle * job.pixels / deepest) / deepest
    before = middle
    for place, channels in enumerate(levels):
        area = float(4 ** (len(levels) - 1 - place))
        shortcut = 2.0 * before * channels if before != channels else 0.0
        level = 18.0 * (before * channels + (2 * spec.layers + 1) * channels**2) + shortcut
        total += level / area
        total += 18.0 * channels**2 * 4 / area if place < len(levels) - 1 else 0.0
        before = channels
    total += 18.0 * before * 3
    return job.batch * job.pixels * total * (STRIP_WORK if placement == "tiled" else 1.0)
