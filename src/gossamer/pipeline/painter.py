"""The loaded pipeline: a prompt and a seed in, a picture with its settings out; adapters attach and detach on the way.

The pictures are made by diffusers' own FluxPipeline and FluxControlPipeline over our components. The starting noise
always comes from a CPU generator, so one seed starts from the same noise on every device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from gossamer.adapters.cost import Cost
from gossamer.adapters.fuse_report import FuseReport
from gossamer.errors import InvalidOptionError
from gossamer.memory.request import Plan
from gossamer.models.swap import QuantizeReport, weight_bytes
from gossamer.pipeline.adapter_set import AdapterSet, wanted_choices
from gossamer.pipeline.components import StorageChoice, pipeline_kinds
from gossamer.pipeline.control import control_map
from gossamer.pipeline.folder import Profile
from gossamer.pipeline.loras import LoraChoice, choose_lora
from gossamer.pipeline.options import STORED, PaintOptions, make
from gossamer.pipeline.picture import Machine, describe, pixels_sha256
from gossamer.pipeline.prepare import Identity, NamedAdapter, build_recipe, require_active, require_control
from gossamer.pipeline.recipe import Recipe
from gossamer.pipeline.residence import NoResidence, Residence
from gossamer.pipeline.schedule import Schedule

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
    """What a Pipeline is made of: `parts` are the components by their diffusers names; `device` is where they compute,
    wherever they are otherwise."""

    parts: Mapping[str, Any]
    report: QuantizeReport
    storage: StorageChoice
    identity: Identity
    profile: Profile
    device: torch.device
    residence: Residence | NoResidence = field(default_factory=NoResidence)


class Pipeline:
    """A FLUX pipeline whose linears are in the chosen formats; `gossamer.load` and `gossamer.optimize` make it."""

    def __init__(self, assembly: Assembly) -> None:
        self._assembly = assembly
        self._adapters = AdapterSet(assembly.parts, assembly.device)

    @property
    def transformer(self) -> Any:
        """The FluxTransformer, a drop-in for diffusers' FluxTransformer2DModel."""
        return self._assembly.parts["transformer"]

    @property
    def components(self) -> dict[str, Any]:
        """Every component by its diffusers name, ready to build another diffusers FLUX pipeline from."""
        return dict(self._assembly.parts)

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
        """Where pictures are computed."""
        return self._assembly.device

    @property
    def plan(self) -> Plan | None:
        """The plan that the components are placed by; None where all of them are on the device for good."""
        return self._assembly.residence.plan

    @property
    def peak_gpu_bytes(self) -> int | None:
        """Most that tensors took of the GPU since loading began; None without a plan."""
        return self._assembly.residence.peak_bytes

    @property
    def kept_layers(self) -> dict[str, str]:
        """Layers of the transformer in another format than the chosen one, with that format or the reason."""
        chosen = self._assembly.storage.transformer
        other = {name: storage for name, storage in self.report.packed.items() if chosen not in (storage, STORED)}
        return {**other, **self.report.kept}

    # adapters ---------------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> dict[str, float]:
        """Scale of each attached adapter by name."""
        return {name: named.choice.scale for name, named in self._adapters.attached.items()}

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The part of a run in which each attached adapter acts, of those that do not act in all of it."""
        windows = {name: named.choice.schedule for name, named in self._adapters.attached.items()}
        return {name: window for name, window in windows.items() if not window.whole}

    @property
    def fused(self) -> dict[str, float]:
        """Scale of each fused adapter by name."""
        return {name: named.choice.scale for name, named in self._adapters.fused.items()}

    @property
    def adapter_costs(self) -> dict[str, Cost]:
        """The memory that each attached adapter takes."""
        return self._adapters.costs()

    def attach(
        self,
        lora: str | Path | LoraChoice,
        scale: float | None = None,
        start: float | None = None,
        end: float | None = None,
    ) -> str:
        """Attach an adapter; the name it answers to comes back.

        Either as one text, NAME_OR_FILE[:SCALE][@START-END], or as a name or path with numbers beside it. `start` and
        `end` are shares of a run's steps: step i of n is active where start <= i / n < end.
        """
        named = self._adapters.read(choose_lora(lora, scale, start, end))
        self._adapters.attach(named)
        return named.name

    def attach_named(self, named: NamedAdapter) -> None:
        """Attach an adapter that was read already."""
        self._adapters.attach(named)

    def detach(self, name: str) -> None:
        """Remove an adapter; the weights are bit for bit what they were."""
        self._adapters.detach(name)

    def set_scale(self, name: str, scale: float) -> None:
        """Change an adapter's strength for the pictures to come."""
        self._adapters.change(name, scale, self._adapters.choice(name).schedule)

    def set_schedule(self, name: str, start: float = 0.0, end: float = 1.0) -> None:
        """Change the part of the run in which an adapter acts; by default it is all of it."""
        self._adapters.change(name, self._adapters.choice(name).scale, Schedule(start, end))

    def swap(self, loras: Mapping[str, float] | Iterable[str | Path | LoraChoice]) -> None:
        """Have exactly these adapters attached: scales by name or file, or a list of what `attach` takes.

        Those that are attached already stay, with their new scale and window, and are not read again; the others come
        after them. After an error the set is the one that it was.
        """
        self._adapters.swap(wanted_choices(loras))

    def fuse(self, names: Iterable[str] | None = None, keep_originals: bool = True) -> FuseReport:
        """Make attached adapters, by default all, part of the weights, and measure how much of them survives that.

        See `gossamer.adapters.fuse`. Pictures say which adapters were fused, and a rerun fuses them again.
        """
        with self._assembly.residence.lifted():
            return self._adapters.fuse(names, keep_originals)

    def unfuse(self) -> tuple[str, ...]:
        """Bring the original weights back, bit for bit, and attach what was fused, last in order; its names."""
        with self._assembly.residence.lifted():
            return self._adapters.unfuse()

    # painting ---------------------------------------------------------------------------------------------------------

    def __call__(self, prompt: str, **options: Any) -> Image.Image:
        """Paint one picture; the options are the fields of PaintOptions: seed, steps, guidance, size, control, ...

        The settings are in the picture's `info`, and `gossamer.save` writes them into the file.
        """
        return self.paint(make(PaintOptions, {"prompt": prompt, **options})).image

    def paint(self, options: PaintOptions, on_step: OnStep | None = None) -> Painting:
        """Paint one picture and say how; `on_step` is called after each denoising step."""
        self._adapters.require_in_step()
        named, spec = self._adapters.all(), self._adapters.spec
        require_control(options.control is not None, spec.in_channels > spec.out_channels, named)
        require_active(named, options.steps)
        assembly = self._assembly
        recipe = build_recipe(options, assembly.profile, assembly.storage, assembly.identity.use(), named)

        def attempt() -> Painting:
            clock = _StepClock(recipe.steps, on_step, self.device)
            started = time.perf_counter()
            image = self._picture(options, recipe, clock)
            seconds = time.perf_counter() - started
            image.info.update(describe(recipe, image, Machine(str(self.device), torch.get_num_threads())))
            return Painting(image, recipe, seconds, clock.seconds_per_step, pixels_sha256(image))

        return assembly.residence.run(attempt)

    def _picture(self, options: PaintOptions, recipe: Recipe, clock: _StepClock) -> Image.Image:
        kinds = pipeline_kinds()
        kind, extra = kinds.text, {}
        if recipe.control is not None:
            guide = control_map(options.control, recipe.control.kind, recipe.width, recipe.height)
            kind, extra = kinds.control, {"control_image": guide}
        pipeline = kind(**self._assembly.parts)
        pipeline.set_progress_bar_config(disable=True)
        pixels = self._denoise(pipeline, recipe, clock, extra)
        _require_finite(pixels, recipe)
        image: Image.Image = pipeline.image_processor.numpy_to_pil(pixels)[0]
        return image

    def _denoise(
        self, pipeline: Any, recipe: Recipe, clock: _StepClock, extra: Mapping[str, Any]
    ) -> np.ndarray[Any, Any]:
        """The pixels of one picture (1, height, width, 3), from 0 to 1."""
        from gossamer.models.flux import prepass

        # read before the first step changes any strength: text encoder terms have no steps
        prompt, pooled = _encode(pipeline, recipe)
        with self._adapters.over_steps(recipe.steps) as at_step, prepass(self.transformer, pipeline.scheduler, at_step):
            clock.before_step = at_step
            at_step(0)
            result = pipeline(
                prompt_embeds=prompt,
                pooled_prompt_embeds=pooled,
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
        pixels: np.ndarray[Any, Any] = result.images
        return pixels


@torch.no_grad()
def _encode(pipeline: Any, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """The prompt as T5 and as CLIP read it."""
    prompt, pooled, _ = pipeline.encode_prompt(
        prompt=recipe.prompt, prompt_2=None, max_sequence_length=recipe.max_sequence_length
    )
    return prompt, pooled


def _require_finite(pixels: np.ndarray[Any, Any], recipe: Recipe) -> None:
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
    """Listens to the end of each step: reports it, takes the time between two ends, and has whatever changes over the
    steps change before the next one begins.

    The first step compiles kernels and the second may be captured, so time is taken from the end of the second on.
    """

    def __init__(self, steps: int, on_step: OnStep | None, device: torch.device) -> None:
        self._steps = steps
        self._on_step = on_step
        self._device = device
        self._ends: list[float] = []
        self._first = min(2, max(1, steps - 1))
        self.before_step: Callable[[int], None] | None = None

    def after_step(self, pipeline: object, step: int, timestep: object, tensors: object) -> dict[str, Any]:
        # the host runs ahead of a GPU; waiting at both ends only makes the time between them right, and costs nothing
        if self._device.type == "cuda" and step + 1 in (self._first, self._steps):
            torch.cuda.synchronize(self._device)
        self._ends.append(time.perf_counter())
        if self._on_step is not None:
            self._on_step(step + 1, self._steps)
        if self.before_step is not None and step + 1 < self._steps:
            self.before_step(step + 1)
        return {}

    @property
    def seconds_per_step(self) -> float | None:
        ends = self._ends[self._first - 1 :]
        return None if len(ends) < 2 else (ends[-1] - ends[0]) / (len(ends) - 1)
