"""An adapter as Gossamer knows it, whatever its file looked like: low-rank terms and replaced norm scales by their
diffusers names, checked against the sizes of the model it is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from gossamer.adapters.text_names import TEXT_ENCODERS, text_sizes
from gossamer.errors import AdapterError, WrongModelError
from gossamer.models.flux_spec import FluxSpec, Shape, linear_shapes, norm_shapes

INPUT_LAYER = "x_embedder"


@dataclass(frozen=True, eq=False)
class LowRankTerm:
    """multiplier * up @ down, added to one linear's weight, and multiplier * bias, added to its bias.

    `down` is (rank, in), `up` is (out, rank), `bias` is (out,) or None; `multiplier` is alpha / rank. The tensors keep
    the type that the file gave them.
    """

    down: torch.Tensor
    up: torch.Tensor
    multiplier: float = 1.0
    bias: torch.Tensor | None = None

    def __post_init__(self) -> None:
        sound = self.down.dim() == 2 and self.up.dim() == 2 and self.down.shape[0] == self.up.shape[1]
        if not sound or (self.bias is not None and self.bias.shape != self.up.shape[:1]):
            bias = "none" if self.bias is None else tuple(self.bias.shape)
            raise AdapterError(
                "The factors of a low-rank term do not fit together.",
                f"down is {tuple(self.down.shape)}, up is {tuple(self.up.shape)}, bias is {bias}; "
                "they have to be (rank, in), (out, rank) and (out,).",
                "Check that all of them come from the same layer of the same file.",
            )

    @property
    def rank(self) -> int:
        """Rows of down, columns of up."""
        return self.down.shape[0]

    @property
    def shape(self) -> Shape:
        """(out, in) of the weight that this is added to."""
        return self.up.shape[0], self.down.shape[1]


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter for a FLUX.1 model of the sizes in `spec`.

    `terms` are by linear, `replacements` by norm scale; a replacement takes the place of the model's values and has no
    strength. `text` holds the terms of each text encoder by component, then by linear, under the names of `text_names`.
    `unused` names the keys of the file that have no effect, with the reason. `metadata` is the file's own free text,
    `sha256` the file's, None for an adapter made in memory.
    """

    spec: FluxSpec
    terms: Mapping[str, LowRankTerm]
    replacements: Mapping[str, torch.Tensor] = field(default_factory=dict)
    spelling: str = "diffusers"
    metadata: Mapping[str, str] = field(default_factory=dict)
    sha256: str | None = None
    text: Mapping[str, Mapping[str, LowRankTerm]] = field(default_factory=dict)
    unused: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_names(self)
        _check_shapes(self)
        for component, terms in self.text.items():
            _check_text_sizes(component, terms)

    @property
    def input_channels(self) -> int | None:
        """Channels that the adapted input layer reads; None when the adapter leaves that layer alone."""
        term = self.terms.get(INPUT_LAYER)
        return None if term is None else term.shape[1]

    def unused_by_reason(self) -> dict[str, list[str]]:
        """The keys that have no effect, under the reason why."""
        reasons: dict[str, list[str]] = {}
        for key, reason in self.unused.items():
            reasons.setdefault(reason, []).append(key)
        return reasons

    def without_text(self) -> Adapter:
        """The transformer's part alone, for use without the text encoders' terms."""
        return replace(self, text={})

    @property
    def is_control(self) -> bool:
        """Whether it widens the input layer, as a Control LoRA does for the latents of its control picture."""
        return self.input_channels is not None and self.input_channels > self.spec.in_channels

    @property
    def base_model(self) -> str | None:
        """The base model as the file's metadata names it."""
        return stated_base_model(self.metadata)


def stated_base_model(metadata: Mapping[str, str]) -> str | None:
    """The base model as trainers write it into a file's metadata."""
    keys = ("base_model", "modelspec.architecture", "ss_base_model_version", "ss_sd_model_name")
    return next((metadata[key] for key in keys if metadata.get(key)), None)


def allowed_input_widths(spec: FluxSpec) -> tuple[int, ...]:
    """Widths of an adapter's input layer that fit: the model's own, the plain latents of a model that reads more, and
    twice the model's own, which is a Control LoRA.
    """
    return tuple(dict.fromkeys((spec.in_channels, min(spec.in_channels, spec.out_channels), 2 * spec.in_channels)))


def _check_names(adapter: Adapter) -> None:
    unknown = [name for name in adapter.terms if name not in linear_shapes(adapter.spec)]
    unknown += [name for name in adapter.replacements if name not in norm_shapes(adapter.spec)]
    unknown += [component for component in adapter.text if component not in TEXT_ENCODERS]
    unknown += [
        f"{component}.{name}"
        for component, terms in adapter.text.items()
        if component in TEXT_ENCODERS
        for name in terms
        if name not in text_sizes(component)
    ]
    if unknown:
        raise WrongModelError(
            f"The adapter changes {len(unknown)} layers that the model does not have: {', '.join(unknown[:5])}"
            + (", ..." if len(unknown) > 5 else "."),
            f"The model has {describe(adapter.spec)}.",
            "Use an adapter that was made for this model.",
        )


def _check_shapes(adapter: Adapter) -> None:
    shapes, norms = linear_shapes(adapter.spec), norm_shapes(adapter.spec)
    for name, term in adapter.terms.items():
        out_features, in_features = shapes[name]
        widths = allowed_input_widths(adapter.spec) if name == INPUT_LAYER else (in_features,)
        if term.shape[0] != out_features or term.shape[1] not in widths:
            raise wrong_size(adapter.spec, name, term.shape, shapes[name])
    for name, values in adapter.replacements.items():
        if tuple(values.shape) != norms[name]:
            raise wrong_size(adapter.spec, name, tuple(values.shape), norms[name])


def _check_text_sizes(component: str, terms: Mapping[str, LowRankTerm]) -> None:
    """Terms of one encoder agree with each other; whether they fit an encoder shows when they are attached."""
    known: dict[str, tuple[int, str]] = {}
    for name, term in terms.items():
        for symbol, size in zip(text_sizes(component)[name], term.shape, strict=True):
            expected, first = known.setdefault(symbol, (size, name))
            if size != expected:
                raise AdapterError(
                    f"The adapter's terms for the {component} do not fit one encoder.",
                    f"By {first!r} its {symbol} is {expected}, by {name!r} it is {size}.",
                    "The file is damaged, or merged from adapters for different models; get another version of it.",
                )


def wrong_size(spec: FluxSpec, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> WrongModelError:
    """The error for a term or norm scale of a shape that the model does not have."""
    return WrongModelError(
        "The adapter was made for a model of another size.",
        f"For {name!r} it brings a change of shape {found}; the model's layer is {expected}, "
        f"in a model of {describe(spec)}.",
        "Use an adapter that was made for this model, or load the model that the adapter was made for.",
    )


def describe(spec: FluxSpec) -> str:
    """A model's sizes in words, for messages."""
    guidance = "with" if spec.guidance_embeds else "without"
    return (
        f"{spec.num_layers} double and {spec.num_single_layers} single blocks of width {spec.width}, "
        f"{spec.in_channels} input channels, {guidance} a guidance embedder"
    )
