"""Exact parameters and bytes of a model's parts in any storage format, without one tensor.

transformer   linears of its blocks in the format, the modulation in eight bits where that is a quantised one
              (`MODULATION_STORAGE`); embedders and last layers as the files store them (`SENSITIVE`)
T5, CLIP      linears in the format; embeddings and norms as the files store them
VAE           as the files store it
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from gossamer.formats import find_format, packed_bytes
from gossamer.memory.model_specs import ClipSpec, T5Spec, VaeSpec
from gossamer.models.flux_spec import (
    MODULATION_STORAGE,
    FluxSpec,
    Shape,
    is_modulation,
    linear_shapes,
    norm_shapes,
)

PLAIN_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)\.")


@dataclass(frozen=True)
class TransformerBytes:
    """Bytes of a transformer, its `blocks` in order, double ones first, their modulation apart.

    `blocks` and `modulation` are weights alone, which is what can leave the GPU. `rest` are embedders, last layers, and
    all biases and norm scales. `storages` is the number of block weights by format. `largest_modulation` is the largest
    linear of the modulation, whose format is `modulation_storage`.
    """

    blocks: tuple[int, ...]
    modulation: int
    rest: int
    storages: Mapping[str, int] = field(default_factory=dict)
    modulation_storage: str = MODULATION_STORAGE
    largest_modulation: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.blocks) + self.modulation + self.rest

    @property
    def storage(self) -> str:
        """The format of most block weights."""
        return max(self.storages, key=lambda name: self.storages[name])


@dataclass(frozen=True)
class EncoderBytes:
    """Bytes of a text encoder: its largest layer, all layers, and what is not in a layer."""

    layer: int
    layers: int
    rest: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.layers + self.rest


# parameters -----------------------------------------------------------------------------------------------------------


def transformer_parameters(spec: FluxSpec) -> int:
    """Weights, biases and norm scales."""
    linears = sum(rows * columns + rows for rows, columns in linear_shapes(spec).values())
    return linears + sum(size for (size,) in norm_shapes(spec).values())


def t5_parameters(spec: T5Spec) -> int:
    """Linears, norms, embeddings and the table of relative positions."""
    return spec.layers * _weights(t5_linears(spec)) + t5_rest(spec)


def clip_parameters(spec: ClipSpec) -> int:
    """Linears with biases, norms and both embeddings."""
    biases = sum(rows for rows, _ in clip_linears(spec))
    return spec.layers * (_weights(clip_linears(spec)) + biases) + clip_rest(spec)


def t5_linears(spec: T5Spec) -> tuple[Shape, ...]:
    """(out, in) of the linears of one layer: q, k, v, o and the gated feed-forward part."""
    inner = spec.heads * spec.head_size
    attention = ((inner, spec.width),) * 3 + ((spec.width, inner),)
    return (*attention, (spec.hidden, spec.width), (spec.hidden, spec.width), (spec.width, spec.hidden))


def t5_rest(spec: T5Spec) -> int:
    """Values outside of linears: embeddings, the table of relative positions, two norms a layer and one at the end."""
    return spec.vocabulary * spec.width + spec.buckets * spec.heads + (2 * spec.layers + 1) * spec.width


def clip_linears(spec: ClipSpec) -> tuple[Shape, ...]:
    """(out, in) of the linears of one layer: q, k, v, out and the feed-forward part, all with biases."""
    return ((spec.width, spec.width),) * 4 + ((spec.hidden, spec.width), (spec.width, spec.hidden))


def clip_rest(spec: ClipSpec) -> int:
    """Values outside of linears: two embeddings, two norms with biases a layer and one at the end."""
    return (spec.vocabulary + spec.positions) * spec.width + 2 * (2 * spec.layers + 1) * spec.width


def vae_parameters(spec: VaeSpec) -> int:
    """Encoder and decoder."""
    quants = (2 * spec.latent) ** 2 + 2 * spec.latent if spec.quant else 0
    quants += spec.latent**2 + spec.latent if spec.post_quant else 0
    return _encoder(spec) + _decoder(spec) + quants


def _encoder(spec: VaeSpec) -> int:
    first, last = spec.channels[0], spec.channels[-1]
    total, before = convolution(3, first), first
    for place, channels in enumerate(spec.channels):
        total += sum(residual_block(before if layer == 0 else channels, channels) for layer in range(spec.layers))
        total += convolution(channels, channels) if place < len(spec.channels) - 1 else 0
        before = channels
    return total + _middle(spec) + 2 * last + convolution(last, 2 * spec.latent)


def _decoder(spec: VaeSpec) -> int:
    last, before = spec.channels[0], spec.channels[-1]
    total = convolution(spec.latent, before) + _middle(spec)
    for place, channels in enumerate(reversed(spec.channels)):
        total += sum(residual_block(before if layer == 0 else channels, channels) for layer in range(spec.layers + 1))
        total += convolution(channels, channels) if place < len(spec.channels) - 1 else 0
        before = channels
    return total + 2 * last + convolution(last, 3)


def _middle(spec: VaeSpec) -> int:
    channels = spec.channels[-1]
    attention = 4 * (channels**2 + channels) + 2 * channels if spec.middle_attention else 0
    return 2 * residual_block(channels, channels) + attention


def residual_block(before: int, after: int) -> int:
    """Two group norms, two convolutions, and a shortcut where the channels change."""
    shortcut = before * after + after if before != after else 0
    return 2 * before + convolution(before, after) + 2 * after + convolution(after, after) + shortcut


def convolution(before: int, after: int) -> int:
    """3 x 3, with a bias."""
    return 9 * before * after + after


def _weights(shapes: Iterable[Shape]) -> int:
    return sum(map(math.prod, shapes))


# bytes ----------------------------------------------------------------------------------------------------------------


def transformer_bytes(
    spec: FluxSpec, storage: str, stored: str = "bf16", modulation_storage: str | None = None
) -> TransformerBytes:
    """The transformer with the linears of its blocks in a format, everything else in the type of its files.

    The modulation is in the format that it has where the others have this one, unless another is given.
    """
    plain, storage = PLAIN_BYTES[stored], find_format(storage).name
    vectors = modulation_storage or (storage if storage in PLAIN_BYTES else MODULATION_STORAGE)
    blocks = [0] * (spec.num_layers + spec.num_single_layers)
    modulation, rest, weights = [0], sum(size for (size,) in norm_shapes(spec).values()) * plain, 0
    shapes = linear_shapes(spec)
    sizes = {shape: linear_bytes(storage, shape, stored) for shape in set(shapes.values())}
    for name, shape in shapes.items():
        place = block_index(name, spec)
        rest += shape[0] * plain
        if place is None:
            rest += math.prod(shape) * plain
        elif is_modulation(name):
            modulation.append(linear_bytes(vectors, shape, stored))
        else:
            blocks[place] += sizes[shape]
            weights += math.prod(shape)
    return TransformerBytes(tuple(blocks), sum(modulation), rest, {storage: weights}, vectors, max(modulation))


def block_index(name: str, spec: FluxSpec) -> int | None:
    """Which block a layer is in, double ones first."""
    place = BLOCK.match(name)
    if place is None:
        return None
    return int(place[2]) + (spec.num_layers if place[1] else 0)


def linear_bytes(storage: str, shape: Shape, stored: str) -> int:
    """A weight in a format, or as it is stored where its width does not fit the format, as `models.swap` keeps it."""
    known = find_format(storage)
    if shape[1] % known.width_multiple:
        return math.prod(shape) * PLAIN_BYTES[stored]
    return packed_bytes(known.name, *shape)


def t5_bytes(spec: T5Spec, storage: str, stored: str = "bf16") -> EncoderBytes:
    """A T5 encoder."""
    layer = sum(linear_bytes(storage, shape, stored) for shape in t5_linears(spec))
    return EncoderBytes(layer, spec.layers * layer, t5_rest(spec) * PLAIN_BYTES[stored])


def clip_bytes(spec: ClipSpec, storage: str, stored: str = "bf16") -> EncoderBytes:
    """A CLIP text model."""
    shapes = clip_linears(spec)
    biases = sum(rows for rows, _ in shapes) * PLAIN_BYTES[stored]
    layer = sum(linear_bytes(storage, shape, stored) for shape in shapes) + biases
    return EncoderBytes(layer, spec.layers * layer, clip_rest(spec) * PLAIN_BYTES[stored])


def vae_bytes(spec: VaeSpec, stored: str = "bf16") -> int:
    """The whole autoencoder."""
    return vae_parameters(spec) * PLAIN_BYTES[stored]
