"""The loaded pipeline: a prompt and a seed in, a picture with its settings out; adapters attach and detach on the way.

The pictures are made by diffusers' own FluxPipeline and FluxControlPipeline over our components. The starting noise
always comes from a CPU generator, so one seed starts from the same noise on every device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from gossamer.adapters.attach import attach, attached, detach, set_scale
from gossamer.errors import AdapterError, InvalidOptionError
from gossamer.models.flux_spec import FluxSpec
from gossamer.models.swap import QuantizeReport, weight_bytes
from gossamer.pipeline.components import StorageChoice, pipeline_kinds
from gossamer.pipeline.control import control_map
from gossamer.pipeline.folder import Profile
from gossamer.pipeline.loras import LoraChoice, parse_lora
from gossamer.pipeline.options import PaintOptions, make
from gossamer.pipeline.picture import Machine, describe, pixels_sha256
from gossamer.pipeline.prepare import Identity, NamedAdapter, build_recipe, free_name, read_adapters, require_control
from gossamer.pipeline.recipe import Recipe

OnStep = Callable[[int, int], None]  # steps done, steps in all


@dataclass(frozen=True, eq=False)
class Painting:
    """A picture, what it was painted from, and how long it took; `seconds_per_step` needs two steps to be measured."""

    image: Image.Image
    recipe: Recipe
    seconds: float
    seconds_per_step: float | None
    pixels_sha256: str


@dataclass(frozen=True, eq=False)
class Assembly:
    """What a Pipeline is made of; `parts` are the components by their diffusers names."""

    parts: Mapping[str, Any]
    report: QuantizeReport
    storage: StorageChoice
    identity: Identity
    profile: Profile


class Pipeline:
    """A FLUX pipeline whose linears are in the chosen formats; `gossamer.load` and `gossamer.optimize` make it."""

    def __init__(self, assembly: Assembly) -> None:
        self._assembly = assembly
        self._adapters: dict[str, NamedAdapter] = {}
        # sizes before any Control LoRA widens the input
        self._spec = FluxSpec.from_config(self.transformer.config)

    @property
    def transformer(self) -> Any:
        """The FluxTransformer, a drop-in for diffusers' FluxTransformer2DModel."""
        return self._assembly.parts["transformer"]

    @property
    def components(self) -> dict[str, Any]:
        """Every component by its diffusers name, ready to build another diffusers FLUX pipeline from."""
        return dict(self._assembly.parts)

    @property
    def _text_encoders(self) -> dict[str, Any]:
        return {name: self._assembly.parts[name] for name in ("text_encoder", "text_encoder_2")}

    @property
    def report(self) -> QuantizeReport:
        """What packing the transformer did, layer by layer."""
        return self._assembly.report

    @property
    def weight_bytes(self) -> int:
        """Bytes of the transformer as it is in memory, attached adapters included."""
        return weight_bytes(self.transformer)

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        device: torch.device = self.transformer.device
        return device

    @property
    def kept_layers(self) -> dict[str, str]:
        """Layers of the transformer in another format than the chosen one, with that format or the reason."""
        chosen = self._assembly.storage.transformer
        other = {name: storage for name, storage in self.report.packed.items() if storage != chosen}
        return {**other, **self.report.kept}

    # adapters ---------------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> dict[str, float]:
        """Scale of each attached adapter by name."""
        return {name: named.choice.scale for name, named in self._adapters.items()}

    def attach(self, lora: str | LoraChoice) -> str:
        """Attach NAME_OR_FILE[:SCALE]; the name it answers to comes back."""
        choice = parse_lora(lora) if isinstance(lora, str) else lora
        (named,) = read_adapters([choice], self._spec)
        same = [other.name for other in self._adapters.values() if other.adapter.sha256 == named.adapter.sha256]
        if same:
            raise AdapterError(
                f"The adapter {choice.source!r} is attached already, as {same[0]!r}.",
                "Attaching it twice would add up both scales unnoticed.",
                "Change its strength with set_scale, or detach it first.",
            )
        name = free_name(named.name, self._adapters)
        self.attach_named(NamedAdapter(name, choice, named.adapter))
        return name

    def attach_named(self, named: NamedAdapter) -> None:
        """Attach an adapter that was read already."""
        attach(self.transformer, named.adapter, named.name, named.choice.scale, self._text_encoders)
        self._adapters[named.name] = named

    def detach(self, name: str) -> None:
        """Remove an adapter; the weights are bit for bit what they were."""
        self._require(name)
        detach(self.transformer, name, self._text_encoders)
        del self._adapters[name]

    def set_scale(self, name: str, scale: float) -> None:
        """Change an adapter's strength for the pictures to come."""
        named = self._require(name)
        changed = LoraChoice(named.choice.source, scale)
        set_scale(self.transformer, name, scale, self._text_encoders)
        self._adapters[name] = NamedAdapter(name, changed, named.adapter)

    def _require(self, name: str) -> NamedAdapter:
        if name not in self._adapters:
            raise AdapterError(
                f"No adapter called {name!r} is attached.",
                f"Attached: {', '.join(self._adapters) or 'none'}.",
                "Use one of the attached names.",
            )
        return self._adapters[name]

    def _require_own_adapters(self) -> None:
        there = {name: attachment.scale for name, attachment in attached(self.transformer).items()}
        if there != self.adapters:
            raise AdapterError(
                "The transformer's adapters were changed behind the pipeline's back.",
                f"On the transformer: {there or 'none'}; in the pipeline: {self.adapters or 'none'}. "
                "The picture would carry settings that are not its own.",
                "Use attach, detach and set_scale of the pipeline.",
            )

    # painting ---------------------------------------------------------------------------------------------------------

    def __call__(self, prompt: str, **options: Any) -> Image.Image:
        """Paint one picture; the options are the fields of PaintOptions: seed, steps, guidance, size, control, ...

        The settings are in the picture's `info`, and `gossamer.save` writes them into the file.
        """
        return self.paint(make(PaintOptions, {"prompt": prompt, **options})).image

    def paint(self, options: PaintOptions, on_step: OnStep | None = None) -> Painting:
        """Paint one picture and say how; `on_step` is called after each denoising step."""
        self._require_own_adapters()
        named = self._adapters.values()
        require_control(options.control is not None, self._spec.in_channels > self._spec.out_channels, named)
        assembly = self._assembly
        recipe = build_recipe(options, assembly.profile, assembly.storage, assembly.identity.use(), named)
        clock = _StepClock(recipe.steps, on_step)
        started = time.perf_counter()
        image = self._denoise(options, recipe, clock)
        seconds = time.perf_counter() - started
        image.info.update(describe(recipe, image, Machine(str(self.device), torch.get_num_threads())))
        return Painting(image, recipe, seconds, clock.seconds_per_step, pixels_sha256(image))

    def _denoise(self, options: PaintOptions, recipe: Recipe, clock: _StepClock) -> Image.Image:
        from gossamer.models.flux import prepass

        kinds = pipeline_kinds()
        kind, extra = kinds.text, {}
        if recipe.control is not None:
            guide = control_map(options.control, recipe.control.kind, recipe.width, recipe.height)
            kind, extra = kinds.control, {"control_image": guide}
        pipeline = kind(**self._assembly.parts)
        pipeline.set_progress_bar_config(disable=True)
        with prepass(self.transformer, pipeline.scheduler):
            result = pipeline(
                prompt=recipe.prompt,
                width=recipe.width,
                height=recipe.height,
                num_inference_steps=recipe.steps,
                guidance_scale=recipe.guidance,
                max_sequence_length=recipe.max_sequence_length,
                generator=torch.Generator("cpu").manual_seed(recipe.seed),
                callback_on_step_end=clock.after_step,
                output_type="np",
                **extra,
            )
        _require_finite(result.images, recipe)
        image: Image.Image = pipeline.image_processor.numpy_to_pil(result.images)[0]
        return image


def _require_finite(pixels: np.ndarray, recipe: Recipe) -> None:
    """Pixels that are not numbers would become arbitrary bytes: no picture comes of them."""
    if np.isfinite(pixels).all():
        return
    scales = ", ".join(f"{adapter.name} at scale {adapter.scale:g}" for adapter in recipe.adapters)
    raise InvalidOptionError(
        f"The picture of seed {recipe.seed} holds values that are not finite.",
        f"Something overflows in this computation: an adapter ({scales or 'none is attached'}), the guidance "
        f"({recipe.guidance:g}), the storage format ({recipe.storage}) or the model's own weights.",
        "Give the adapters smaller scales, such as 1, or leave them out."
        if scales
        else "Try guidance 3.5 and the storage format 'stored'.",
    )


class _StepClock:
    """Listens to the end of each step: reports it, and takes the time between the first end and the last."""

    def __init__(self, steps: int, on_step: OnStep | None) -> None:
        self._steps = steps
        self._on_step = on_step
        self._ends: list[float] = []

    def after_step(self, pipeline: object, step: int, timestep: object, tensors: object) -> dict[str, Any]:
        self._ends.append(time.perf_counter())
        if self._on_step is not None:
            self._on_step(step + 1, self._steps)
        return {}

    @property
    def seconds_per_step(self) -> float | None:
        if len(self._ends) < 2:
            return None
        return (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
