"""What is attached to a model, remembered on the model itself, and its effect on norms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from gossamer.adapters.adapter import TRANSFORMER, Adapter
from gossamer.adapters.cost import Cost
from gossamer.adapters.norms import NormChange, set_norms
from gossamer.adapters.places import Places
from gossamer.adapters.text_encoders import TextEncoders
from gossamer.errors import AdapterError
from gossamer.layers import Strength

RECORD = "attached_adapters"


@dataclass(frozen=True, eq=False)
class Attachment:
    """An adapter on a model: its strength, what it does to norms by component, where its terms are, and its memory.

    `multipliers` are those of its terms, each once. `seen` is the strength's count of changes when all terms were last
    found on their layers.
    """

    adapter: Adapter
    strength: Strength
    multipliers: frozenset[float]
    places: Places
    seen: int
    norms: Mapping[str, NormChange] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)

    @property
    def scale(self) -> float:
        """How strongly it acts, as it was attached or set last."""
        return self.strength.value

    def in_place(self) -> bool:
        """Whether no term of the transformer came or went, and no layer was replaced, since all of them were found."""
        return self.seen == self.strength.changes and self.places.hold()


def attached(model: nn.Module) -> dict[str, Attachment]:
    """What is attached to the model by name, in order of attachment."""
    return dict(model.__dict__.get(RECORD, {}))


def find(model: nn.Module, name: str) -> Attachment:
    """The record of an adapter."""
    records = attached(model)
    if name not in records:
        raise AdapterError(
            f"No adapter called {name!r} is attached.",
            f"Attached: {', '.join(records) or 'none'}.",
            "Use one of the attached names.",
        )
    return records[name]


def remember(model: nn.Module, name: str, record: Attachment) -> Attachment:
    """Put a record in the place of the one that is there."""
    setattr(model, RECORD, {**attached(model), name: record})
    return record


def set_records(model: nn.Module, encoders: TextEncoders, records: Mapping[str, Attachment]) -> None:
    """Bring the norms to what these records say, and remember them."""
    before = attached(model)
    components = dict.fromkeys(of for record in (*before.values(), *records.values()) for of in record.norms)
    show_norms(model, encoders, components, before, records)
    if records:
        setattr(model, RECORD, dict(records))
    else:
        model.__dict__.pop(RECORD, None)


def show_norms(
    model: nn.Module,
    encoders: TextEncoders,
    components: Iterable[str],
    before: Mapping[str, Attachment],
    after: Mapping[str, Attachment],
) -> None:
    """Bring the norms of these components from what one set of records says to what another one says."""
    for component in components:
        if component != TRANSFORMER and component not in encoders:
            continue  # nothing of it changes: an adapter that changes it cannot come, go or be scaled without it
        module = model if component == TRANSFORMER else encoders[component]
        changes = ([of.norms[component] for of in each.values() if component in of.norms] for each in (before, after))
        set_norms(module, *changes)
