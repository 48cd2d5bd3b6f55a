"""Paint a picture again from the settings that it carries, and say whether the pixels are the same.

Model, adapters and control picture must have the recorded SHA-256, and the recorded number of CPU threads is used. A
different version of a library, or another device, is only noted, because it may or may not change the pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from gossamer.errors import NotReproducibleError
from gossamer.pipeline.load import assemble
from gossamer.pipeline.loras import LoraChoice
from gossamer.pipeline.options import UNDECIDED, LoadOptions, PaintOptions
from gossamer.pipeline.painter import OnStep, Painting
from gossamer.pipeline.parse import Size
from gossamer.pipeline.picture import PictureRecord, pixels_sha256, read_picture
from gossamer.pipeline.prepare import Prepared, prepare
from gossamer.pipeline.recipe import Recipe
from gossamer.pipeline.schedule import Schedule
from gossamer.pipeline.versions import versions

SAME_FILES = "Only the same files lead to the same pixels."


@dataclass(frozen=True, eq=False)
class Rerun:
    """The new painting, whether its pixels are the recorded ones, its largest difference to the file, and notes."""

    painting: Painting
    identical: bool
    largest_difference: int
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ReadyRerun:
    """A rerun whose files were all found to be the recorded ones; `notes` are the differences that remain."""

    record: PictureRecord
    prepared: Prepared
    options: PaintOptions
    notes: tuple[str, ...]

    def paint(self, on_step: OnStep | None = None, on_loaded: Callable[[], None] | None = None) -> Rerun:
        """Load the model and paint; `on_loaded` is called between the two."""
        pipeline = assemble(self.prepared)
        if on_loaded is not None:
            on_loaded()
        with _cpu_threads(self.record.machine.threads):
            painting = pipeline.paint(self.options, on_step)
        return Rerun(
            painting=painting,
            identical=painting.pixels_sha256 == self.record.pixels_sha256,
            largest_difference=_largest_difference(painting, self.record),
            notes=self.notes,
        )


def rerun(path: str | Path, device: str = "auto", on_step: OnStep | None = None) -> Rerun:
    """Paint the picture in a file again."""
    return prepare_rerun(path, device).paint(on_step)


def prepare_rerun(path: str | Path, device: str = "auto") -> ReadyRerun:
    """Check that everything a picture was painted from is still there and still the same."""
    record = read_picture(path)
    old = record.recipe
    if old.model.components is None:
        raise NotReproducibleError(
            f"{str(path)!r} was painted by a pipeline that was made in memory.",
            f"Its weights were those of {old.model.source!r} as a program had them then; no file holds them.",
            "Paint it again with that program.",
        )
    if old.control is not None and old.control.source is None:
        raise NotReproducibleError(
            f"{str(path)!r} was guided by a control picture that was given in memory.",
            f"It is not in any file; its SHA-256 is {old.control.sha256}.",
            "Paint it again with that program, or give the control picture as a file.",
        )
    options = _paint_options(old)
    prepared = _with_fused(prepare(_load_options(old, device), options), old)
    new = prepared.recipe(options)
    _require_same_files(old, new)
    if not old.same_pixels(new):
        raise NotReproducibleError(
            f"The settings in {str(path)!r} do not mean today what they meant.",
            f"They were read as {new}.",
            "Use the version of Gossamer that painted it: " + record.versions.get("gossamer", "unknown") + ".",
        )
    return ReadyRerun(record, prepared, options, _notes(record, str(prepared.device)))


def _load_options(recipe: Recipe, device: str) -> LoadOptions:
    return LoadOptions(
        model=recipe.model.source,
        base=recipe.model.base,
        storage=recipe.storage,
        text_storage=recipe.text_storage,
        compute=recipe.compute,
        attention=recipe.attention,
        skip=recipe.skip,
        loras=tuple(LoraChoice(use.source, use.scale, Schedule(use.start, use.end)) for use in recipe.adapters),
        device=device,
    )


def _with_fused(prepared: Prepared, recipe: Recipe) -> Prepared:
    """The adapters that were fused then are fused again."""
    pairs = zip(prepared.adapters, recipe.adapters, strict=True)
    return replace(prepared, adapters=tuple(replace(named, fused=use.fused) for named, use in pairs))


def _paint_options(recipe: Recipe) -> PaintOptions:
    return PaintOptions(
        prompt=recipe.prompt,
        seed=recipe.seed,
        steps=recipe.steps,
        guidance=recipe.guidance,
        size=Size(recipe.width, recipe.height),
        control=recipe.control.source if recipe.control else None,
        control_kind=recipe.control.kind if recipe.control else UNDECIDED,
        max_sequence_length=recipe.max_sequence_length,
    )


def _require_same_files(old: Recipe, new: Recipe) -> None:
    before, now = old.model.components or {}, new.model.components or {}
    changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    if changed:
        raise _other_file(f"The model {old.model.source!r}", f"These components differ: {', '.join(changed)}.")
    for one, two in zip(old.adapters, new.adapters, strict=True):
        if one.sha256 != two.sha256:
            raise _other_file(f"The adapter {one.source!r}", f"SHA-256 was {one.sha256}, is {two.sha256}.")
    if old.control and new.control and old.control.sha256 != new.control.sha256:
        why = f"SHA-256 was {old.control.sha256}, is {new.control.sha256}."
        raise _other_file(f"The control picture {old.control.source!r}", why)


def _other_file(what: str, why: str) -> NotReproducibleError:
    return NotReproducibleError(
        f"{what} is not the one that the picture was painted with.",
        f"{why} {SAME_FILES}",
        "Put the original file back, or paint a new picture with `gossamer run`.",
    )


@contextmanager
def _cpu_threads(count: int) -> Iterator[None]:
    """As many threads as the picture was painted with, since sums in another order round differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _notes(record: PictureRecord, device: str) -> tuple[str, ...]:
    now = versions()
    names = sorted({*record.versions, *now})
    notes = [
        f"{name} was {record.versions.get(name, 'absent')}, is {now.get(name, 'absent')}"
        for name in names
        if record.versions.get(name) != now.get(name)
    ]
    if record.machine.device.split(":")[0] != device.split(":")[0]:
        notes.append(f"the device was {record.machine.device}, is {device}")
    if pixels_sha256(record.image) != record.pixels_sha256:
        notes.append("the pixels in the file were changed since it was painted")
    return tuple(notes)


def _largest_difference(painting: Painting, record: PictureRecord) -> int:
    """Largest difference of a channel of a pixel, in steps of 1/255, to the pixels in the file."""
    new, old = np.asarray(painting.image, dtype=np.int16), np.asarray(record.image, dtype=np.int16)
    return int(np.abs(new - old).max()) if new.shape == old.shape else 255
