"""Everything that decides the pixels of a picture, as data that goes into the picture and leads back to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from gossamer.errors import FileDamagedError


@dataclass(frozen=True)
class ModelUse:
    """The model as the user named it, and the SHA-256 of each component; None for a pipeline made in memory."""

    source: str
    components: Mapping[str, str] | None


@dataclass(frozen=True)
class AdapterUse:
    """An attached adapter: its name, the file as the user named it, its scale and the SHA-256 of the file."""

    name: str
    source: str
    scale: float
    sha256: str | None


@dataclass(frozen=True)
class ControlUse:
    """The control picture: its kind, the file as the user named it, None for one in memory, and its SHA-256."""

    kind: str
    source: str | None
    sha256: str


@dataclass(frozen=True)
class Recipe:
    """The settings of one picture. Storage formats are as resolved, never 'stored'."""

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

    def same_pixels(self, other: Recipe) -> bool:
        """Whether both lead to the same pixels: where the same files were found does not matter."""
        return self._without_places() == other._without_places()

    def _without_places(self) -> Recipe:
        return replace(
            self,
            model=replace(self.model, source=""),
            adapters=tuple(replace(adapter, name="", source="") for adapter in self.adapters),
            control=replace(self.control, source="") if self.control else None,
        )


def to_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON values."""
    return asdict(recipe)


def from_json(content: object, where: str) -> Recipe:
    """The recipe in JSON values that came from outside; every field must be there, of its type, and no other."""
    values = _fields(Recipe, content, where)
    model = _fields(ModelUse, values["model"], where)
    _check(model, {"source": str, "components": (dict, type(None))}, where)
    adapters = [_fields(AdapterUse, adapter, where) for adapter in _list(values["adapters"], where)]
    for adapter in adapters:
        _check(adapter, {"name": str, "source": str, "scale": (int, float), "sha256": (str, type(None))}, where)
    control = None if values["control"] is None else _fields(ControlUse, values["control"], where)
    _check(control or {}, {"kind": str, "source": (str, type(None)), "sha256": str}, where)
    _check(values, dict.fromkeys(("prompt", "storage", "text_storage", "compute"), str), where)
    _check(values, dict.fromkeys(("seed", "steps", "width", "height", "max_sequence_length"), int), where)
    _check(values, {"guidance": (int, float)}, where)
    return Recipe(
        **{
            **values,
            "skip": tuple(map(str, _list(values["skip"], where))),
            "model": ModelUse(**model),
            "adapters": tuple(AdapterUse(**adapter) for adapter in adapters),
            "control": ControlUse(**control) if control else None,
        }
    )


def _fields(kind: type, content: object, where: str) -> dict[str, Any]:
    names = {known.name for known in fields(kind)}
    if not isinstance(content, dict) or set(content) != names:
        raise _unreadable(where, f"{kind.__name__} has to hold exactly: {', '.join(sorted(names))}.")
    return content


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
