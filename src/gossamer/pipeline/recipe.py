"""Everything that decides the pixels of a picture, as data that goes into the picture and leads back to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any

from gossamer.errors import FileDamagedError


@dataclass(frozen=True)
class ModelUse:
    """The model as the user named it, and the SHA-256 of each component; None for a pipeline made in memory.

    `base` is the model that parts come from which the first one lacks.
    """

    source: str
    components: Mapping[str, str] | None
    base: str | None = None


@dataclass(frozen=True)
class AdapterUse:
    """An adapter: its name, the file as the user named it, its scale and the SHA-256 of the file.

    It acts from `start` to `end`, shares of the run (see `schedule`), or is fused into the weights for all of it.
    """

    name: str
    source: str
    scale: float
    sha256: str | None
    start: float = 0.0
    end: float = 1.0
    fused: bool = False


@dataclass(frozen=True)
class ControlUse:
    """The control picture: its kind, the file as the user named it, None for one in memory, and its SHA-256."""

    kind: str
    source: str | None
    sha256: str


@dataclass(frozen=True)
class Recipe:
    """The settings of one picture, fused adapters first.

    Storage formats are as resolved: 'stored' where no single format is. The first pictures, whose attention was exact,
    do not say so.
    """

    prompt: str
    seed: int
    steps: int
    guidance: float
    width: int
    height: int
    max_sequence_length: int
    storage: str
    text_storage: str
    compute: str
    skip: tuple[str, ...]
    model: ModelUse
    adapters: tuple[AdapterUse, ...]
    control: ControlUse | None
    attention: str = "exact"

    def same_pixels(self, other: Recipe) -> bool:
        """Whether both lead to the same pixels: where the same files were found does not matter."""
        return self._without_places() == other._without_places()

    def _without_places(self) -> Recipe:
        return replace(
            self,
            model=replace(self.model, source="", base=None),
            adapters=tuple(replace(adapter, name="", source="") for adapter in self.adapters),
            control=replace(self.control, source="") if self.control else None,
        )


def to_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON values."""
    return asdict(recipe)


def from_json(content: object, where: str) -> Recipe:
    """The recipe in JSON values that came from outside; every field must be there, of its type, and no other.

    An adapter's window, and whether it was fused, may be missing: the first pictures did not say it.
    """
    values = _fields(Recipe, content, where)
    model = _fields(ModelUse, values["model"], where)
    _check(model, {"source": str, "components": (dict, type(None)), "base": (str, type(None))}, where)
    adapters = [_fields(AdapterUse, adapter, where) for adapter in _list(values["adapters"], where)]
    for adapter in adapters:
        _check(adapter, {"name": str, "source": str, "sha256": (str, type(None))}, where)
        _check(adapter, dict.fromkeys(("scale", "start", "end"), (int, float)), where)
    uses = tuple(AdapterUse(**adapter) for adapter in adapters)
    _require_windows(uses, where)
    control = None if values["control"] is None else _fields(ControlUse, values["control"], where)
    _check(control or {}, {"kind": str, "source": (str, type(None)), "sha256": str}, where)
    _check(values, dict.fromkeys(("prompt", "storage", "text_storage", "compute", "attention"), str), where)
    _check(values, dict.fromkeys(("seed", "steps", "width", "height", "max_sequence_length"), int), where)
    _check(values, {"guidance": (int, float)}, where)
    return Recipe(
        **{
            **values,
            "skip": tuple(map(str, _list(values["skip"], where))),
            "model": ModelUse(**model),
            "adapters": uses,
            "control": ControlUse(**control) if control else None,
        }
    )


def _fields(kind: type, content: object, where: str) -> dict[str, Any]:
    names = {known.name for known in fields(kind)}
    needed = {known.name for known in fields(kind) if known.default is MISSING}
    if not isinstance(content, dict) or not needed <= set(content) <= names:
        raise _unreadable(where, f"{kind.__name__} has to hold exactly: {', '.join(sorted(names))}.")
    return content


def _require_windows(uses: tuple[AdapterUse, ...], where: str) -> None:
    """Windows are parts of a run; what is fused acts in all of it, and comes before what is not."""
    for use in uses:
        whole = (use.start, use.end) == (0, 1)
        if not 0 <= use.start < use.end <= 1 or not isinstance(use.fused, bool) or (use.fused and not whole):
            raise _unreadable(where, f"{use.name!r} acts from {use.start!r} to {use.end!r}, fused: {use.fused!r}.")
    if [use.fused for use in uses] != sorted((use.fused for use in uses), reverse=True):
        raise _unreadable(where, "An adapter that is fused comes after one that is not.")


def _list(content: object, where: str) -> list[Any]:
    if not isinstance(content, list):
        raise _unreadable(where, "A list was expected.")
    return content


def _check(values: Mapping[str, Any], types: Mapping[str, Any], where: str) -> None:
    for name, value in values.items():
        if name in types and (not isinstance(value, types[name]) or isinstance(value, bool)):
            raise _unreadable(where, f"{name!r} is {value!r}.")


def _unreadable(where: str, why: str) -> FileDamagedError:
    return FileDamagedError(
        f"The settings in {where!r} cannot be read.",
        why,
        "They may come from another version of Gossamer, or the picture was edited; paint it anew.",
    )
