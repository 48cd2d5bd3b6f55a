"""What can be checked before a model is loaded: formats, device, the model's files, adapters, the control picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from threading import Thread

import torch

from gossamer.adapters.adapter import Adapter
from gossamer.adapters.read import read_adapter
from gossamer.errors import AdapterError, InvalidOptionError, UnknownOptionError
from gossamer.formats import find_packing_format
from gossamer.models.flux_spec import FluxSpec, linear_shapes
from gossamer.pipeline.components import StorageChoice, pick_device
from gossamer.pipeline.control import describe_control
from gossamer.pipeline.fit import Fit, NoPlan, fit
from gossamer.pipeline.folder import Profile
from gossamer.pipeline.lora_sources import locate
from gossamer.pipeline.loras import CONTROL_LORA, LoraChoice
from gossamer.pipeline.model import Model, open_model
from gossamer.pipeline.options import AUTO, EMBEDDED, STORED, LoadOptions, PaintOptions
from gossamer.pipeline.parse import Size
from gossamer.pipeline.recipe import AdapterUse, ModelUse, Recipe
from gossamer.pipeline.stored import one_format


@dataclass(frozen=True, eq=False)
class NamedAdapter:
    """An adapter that was read, the name it is attached under, how the user named it, and whether it is fused."""

    name: str
    choice: LoraChoice
    adapter: Adapter
    fused: bool = False

    @property
    def use(self) -> AdapterUse:
        """Its entry in a recipe."""
        choice, window = self.choice, self.choice.schedule
        sha256 = self.adapter.sha256
        return AdapterUse(self.name, choice.source, choice.scale, sha256, window.start, window.end, self.fused)


@dataclass(frozen=True, eq=False)
class Identity:
    """The model's name, that of its base, and its hashes as they will be known: hashing runs beside the loading."""

    source: str
    base: str | None
    hashes: Future[dict[str, str]] | None

    def use(self) -> ModelUse:
        """Its entry in a recipe; waits for the hashes."""
        return ModelUse(self.source, None if self.hashes is None else self.hashes.result(), self.base)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A load that is ready to happen, and the plan that it happens by."""

    identity: Identity
    model: Model
    storage: StorageChoice
    device: torch.device
    adapters: tuple[NamedAdapter, ...]
    fit: Fit | NoPlan

    def check(self, options: PaintOptions) -> None:
        """Raise where painting with `options` could not work, without waiting for the model's hashes."""
        require_control(options.control is not None, self.model.is_control, self.adapters)
        require_active(self.adapters, options.steps)
        if options.control is not None:
            describe_control(options.control, options.control_kind)

    def recipe(self, options: PaintOptions) -> Recipe:
        """What painting with `options` would be, without loading anything."""
        self.check(options)
        return build_recipe(options, self.model.profile, self.storage, self.identity.use(), self.adapters)


def prepare(options: LoadOptions, paint: PaintOptions | None = None) -> Prepared:
    """Check the options against what is there: formats, device, model folder, adapters; and plan for painting like
    `paint`, by default at the model's own size."""
    for name in (options.storage, options.text_storage):
        if name not in (STORED, AUTO):
            find_packing_format(name)
    device = pick_device(options.device)
    model = open_model(options.model, options.base)
    require_patterns(options.skip, model.spec)
    adapters = read_adapters(options.loras, model.spec, device)
    fitted = fit(options, model, device, paint, [named.adapter for named in adapters])
    identity = Identity(options.model, options.base, _in_background(model))
    return Prepared(identity, model, _storage(options, model, fitted), device, adapters, fitted)


def prepare_with_control(options: LoadOptions, paint: PaintOptions | None = None) -> Prepared:
    """As `prepare`, for pictures with a control picture: the bundled Control LoRA is added where none was named. It is
    too small to change a plan."""
    prepared = prepare(options, paint)
    if prepared.model.is_control or any(named.adapter.is_control for named in prepared.adapters):
        return prepared
    if options.model != EMBEDDED:
        raise InvalidOptionError(
            "A control picture was given, but nothing here reads one.",
            f"{options.model!r} has no control input, no adapter brings one, and the bundled Control LoRA is made "
            "for the embedded model.",
            "Name a Control LoRA for this model with --lora, or load a Canny or Depth model.",
        )
    control = LoraChoice(CONTROL_LORA)
    return replace(prepared, adapters=read_adapters((*options.loras, control), prepared.model.spec, prepared.device))


def read_adapters(
    choices: Iterable[LoraChoice], spec: FluxSpec, device: torch.device | str = "cpu"
) -> tuple[NamedAdapter, ...]:
    """Read adapters in order, each under a name of its own, for a model on that device."""
    named: dict[str, NamedAdapter] = {}
    paths: list[Path] = []
    for choice in choices:
        path = locate(choice)
        if path.resolve() in paths:
            raise AdapterError(
                f"The adapter {choice.source!r} was named twice.",
                "Attaching it twice would add up both scales unnoticed.",
                "Name it once, with the scale you want.",
            )
        paths.append(path.resolve())
        name = free_name(choice.stem, named)
        named[name] = NamedAdapter(name, choice, read_adapter(path, spec, device))
    return tuple(named.values())


def free_name(stem: str, taken: Mapping[str, object]) -> str:
    """`stem`, or with a number behind it where another adapter has that name."""
    return next(name for name in (stem, *(f"{stem}-{i}" for i in range(2, len(taken) + 3))) if name not in taken)


def require_control(given: bool, wanted: bool, adapters: Iterable[NamedAdapter]) -> None:
    """A control picture and something that reads it come together; `wanted`: the model itself reads one."""
    readers = [named.name for named in adapters if named.adapter.is_control]
    if given and not (wanted or readers):
        raise InvalidOptionError(
            "A control picture was given, but nothing attached reads one.",
            "A control picture acts through a Control LoRA or a control model.",
            f"Attach a Control LoRA first, for example the bundled {CONTROL_LORA!r}.",
        )
    if (wanted or readers) and not given:
        raise InvalidOptionError(
            "A control picture is needed.",
            f"{readers[0]!r} is a Control LoRA." if readers else "The model is a control model.",
            "Give one with --control IMAGE (in Python: control=), or leave the Control LoRA out.",
        )


def require_active(adapters: Iterable[NamedAdapter], steps: int) -> None:
    """Every adapter acts in at least one step of the run."""
    for named in adapters:
        window = named.choice.schedule
        if not window.active_steps(steps):
            raise InvalidOptionError(
                f"The adapter {named.name!r} would act in no step of this run.",
                f"Step i of {steps}, counted from 0, is active where {window.start:g} <= i/{steps} < {window.end:g}; "
                "no i is.",
                f"Make the window at least 1/{steps} wide, take more steps, or leave the adapter out.",
            )


def build_recipe(
    options: PaintOptions,
    profile: Profile,
    storage: StorageChoice,
    model: ModelUse,
    adapters: Iterable[NamedAdapter],
) -> Recipe:
    """The recipe of one picture, every default filled in."""
    size = options.size or Size(profile.picture_side, profile.picture_side)
    return Recipe(
        prompt=options.prompt,
        seed=options.seed,
        steps=options.steps,
        guidance=float(options.guidance),
        width=size.width,
        height=size.height,
        max_sequence_length=options.max_sequence_length or profile.max_sequence_length,
        storage=storage.transformer,
        text_storage=storage.text,
        compute=storage.compute,
        attention=storage.attention,
        skip=storage.skip,
        model=model,
        adapters=tuple(named.use for named in adapters),
        control=None if options.control is None else describe_control(options.control, options.control_kind),
    )


def require_patterns(patterns: Iterable[str], spec: FluxSpec) -> None:
    """Every pattern fits at least one linear of the transformer."""
    names = list(linear_shapes(spec))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            nearest = get_close_matches(pattern, names, n=3, cutoff=0.3)
            raise UnknownOptionError(
                f"No linear layer of the transformer is called {pattern!r}.",
                f"It has {len(names)} linear layers" + (f"; nearest: {', '.join(nearest)}." if nearest else "."),
                "Give a full dotted name, or a pattern such as '*.norm*.linear'.",
            )


def _storage(options: LoadOptions, model: Model, fitted: Fit | NoPlan) -> StorageChoice:
    """Formats as they were named; what was left open is as stored, unless the plan has another."""
    texts = one_format({model.stored["text_encoder"], model.stored["text_encoder_2"]})
    names = [options.storage, options.text_storage]
    if isinstance(fitted, Fit):
        planned = (fitted.chosen.storage, fitted.chosen.text_storage)
        names = [
            plan if name == AUTO and not leaves else name
            for name, plan, leaves in zip(names, planned, fitted.leaves_formats, strict=True)
        ]
    transformer, text = map(_resolve, names, (model.stored["transformer"], texts))
    return StorageChoice(transformer, text, options.skip, options.compute, options.attention)


def _resolve(storage: str, stored: str) -> str:
    return stored if storage in (STORED, AUTO) else find_packing_format(storage).name


def _in_background(model: Model) -> Future[dict[str, str]]:
    """The hashes of a model; the thread is a daemon, so that an interrupted run does not wait for it."""
    future: Future[dict[str, str]] = Future()

    def work() -> None:
        try:
            future.set_result(model.hashes())
        except BaseException as error:  # noqa: BLE001 - handed on to whoever asks for the result
            future.set_exception(error)

    Thread(target=work, daemon=True).start()
    return future
