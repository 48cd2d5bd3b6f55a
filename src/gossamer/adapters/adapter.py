"""An adapter as Gossamer knows it, whatever its file looked like: terms of linears and changes of norms by their
diffusers names, checked against the sizes of the model it is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from gossamer.adapters.terms import DecomposedTerm, LinearTerm
from gossamer.adapters.text_names import TEXT_ENCODERS, text_norm_parameters, text_sizes
from gossamer.errors import AdapterError, WrongModelError
from gossamer.models.flux_spec import FluxSpec, linear_shapes, norm_shapes

INPUT_LAYER = "x_embedder"
TRANSFORMER = "transformer"


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter for a FLUX.1 model of the sizes in `spec`.

    `terms` are by linear, `replacements` by norm scale; a replacement takes the place of the model's values and has no
    strength. `text` holds the terms of each text encoder by component, then by linear, under the names of `text_names`.
    `norm_differences` are added to parameters of norms, by component ("transformer" or a text encoder) and parameter.
    `unused` names the keys of the file that have no effect, with the reason. `metadata` is the file's own free text,
    `sha256` the file's, None for an adapter made in memory.
    """

    spec: FluxSpec
    terms: Mapping[str, LinearTerm]
    replacements: Mapping[str, torch.Tensor] = field(default_factory=dict)
    spelling: str = "diffusers"
    metadata: Mapping[str, str] = field(default_factory=dict)
    sha256: str | None = None
    text: Mapping[str, Mapping[str, LinearTerm]] = field(default_factory=dict)
    unused: Mapping[str, str] = field(default_factory=dict)
    norm_differences: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_names(self)
        _check_shapes(self)
        for component, terms in self.text.items():
            _check_text_sizes(component, terms)

    @property
    def input_channels(self) -> int | None:
        """Channels that the adapted input layer reads; None when the adapter leaves that layer alone."""
        term = self.terms.get(INPUT_LAYER)
        return None if term is None or len(term.shape) < 2 else term.shape[1]

    @property
    def text_components(self) -> tuple[str, ...]:
        """The text encoders that it changes."""
        changed = {*self.text, *self.norm_differences}
        return tuple(component for component in TEXT_ENCODERS if component in changed)

    def unused_by_reason(self) -> dict[str, list[str]]:
        """The keys that have no effect, under the reason why."""
        reasons: dict[str, list[str]] = {}
        for key, reason in self.unused.items():
            reasons.setdefault(reason, []).append(key)
        return reasons

    def without_text(self) -> Adapter:
        """The transformer's part alone, for use without the text encoders' terms."""
        own = {component: of for component, of in self.norm_differences.items() if component == TRANSFORMER}
        return replace(self, text={}, norm_differences=own)

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
    linears, norms = linear_shapes(adapter.spec), norm_shapes(adapter.spec)
    unknown = [name for name in adapter.terms if name not in linears]
    unknown += [name for name in adapter.replacements if name not in norms]
    for component, terms in adapter.text.items():
        known = text_sizes(component) if component in TEXT_ENCODERS else {}
        unknown += [f"{component}.{name}" for name in terms if name not in known] if known else [component]
    for component, differences in adapter.norm_differences.items():
        parameters = norms if component == TRANSFORMER else _text_parameters(component)
        unknown += [f"{component}.{name}" for name in differences if name not in parameters]
    if unknown:
        raise WrongModelError(
            f"The adapter changes {len(unknown)} layers that the model does not have: {', '.join(unknown[:5])}"
            + (", ..." if len(unknown) > 5 else "."),
            f"The model has {describe(adapter.spec)}.",
            "Use an adapter that was made for this model.",
        )


def _text_parameters(component: str) -> frozenset[str]:
    return text_norm_parameters(component) if component in TEXT_ENCODERS else frozenset()


def _check_shapes(adapter: Adapter) -> None:
    shapes, norms = linear_shapes(adapter.spec), norm_shapes(adapter.spec)
    for name, term in adapter.terms.items():
        fitting = [shapes[name]]
        if name == INPUT_LAYER:
            fitting = [(shapes[name][0], width) for width in allowed_input_widths(adapter.spec)]
        if term.shape not in [shape[: len(term.shape)] for shape in fitting]:
            raise wrong_size(adapter.spec, name, term.shape, shapes[name])
    for values in (adapter.replacements, adapter.norm_differences.get(TRANSFORMER, {})):
        for name, value in values.items():
            if tuple(value.shape) != norms[name]:
                raise wrong_size(adapter.spec, name, tuple(value.shape), norms[name])
    _check_input_layer(adapter)


def _check_input_layer(adapter: Adapter) -> None:
    """DoRA's norms run over the inputs that it was trained with, and the model reads more of its own."""
    term, channels = adapter.terms.get(INPUT_LAYER), adapter.input_channels
    if isinstance(term, DecomposedTerm) and channels is not None and channels < adapter.spec.in_channels:
        raise WrongModelError(
            f"The DoRA of {INPUT_LAYER!r} was trained with {channels} input channels, and this model reads "
            f"{adapter.spec.in_channels}.",
            "Its magnitudes are those of a layer without the further channels, so they would shrink the channels that "
            "both have; other kinds of adapters get zero columns instead.",
            f"Use the adapter on the model that it was made for, or leave its change of {INPUT_LAYER!r} out.",
        )


def _check_text_sizes(component: str, terms: Mapping[str, LinearTerm]) -> None:
    """Terms of one encoder agree with each other; whether they fit an encoder shows when they are attached."""
    known: dict[str, tuple[int, str]] = {}
    for name, term in terms.items():
        for symbol, size in zip(text_sizes(component)[name], term.shape, strict=False):  # a bias has no inputs
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
