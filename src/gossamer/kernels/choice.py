"""Compute type and backends for one storage format on one chip: a pure function, with the reason for every decision.

"auto" is the fastest that keeps the accuracy class of the storage:

    fp32, fp16, bf16     products in a type that holds the stored values
    everything narrower  the class of row-scaled fp8: fp8 products where the chip has fp8 units, else 16-bit products

int8 products are of that class too, but are chosen only where they were measured to be faster, which is nowhere yet.
"exact" never rounds activations below 16 bits. Any other wish is a compute type, met or refused, never replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gossamer.errors import InvalidOptionError
from gossamer.formats import find_format
from gossamer.kernels.backends import attention_backend, decode_backend, merge_backend, product_backend
from gossamer.kernels.capability import LATER, Capability
from gossamer.kernels.options import Option, Picked, Reason, pick
from gossamer.kernels.products import shape_obstacle
from gossamer.kernels.wishes import COMPUTES, Compute, require_wish

PLAIN_ORDERS = {"fp32": ("fp32",), "bf16": ("bf16", "fp16", "fp32"), "fp16": ("fp16", "fp32")}

FLUX_HEAD_DIM = 128
FLUX_WIDTH = 3072  # a multiple of every block size, so that formats with blocks count as what they usually are


@dataclass(frozen=True)
class Choice:
    """What runs, and why.

    `decode` serves while no adapter is attached ("none": the stored bytes are the operand), `merge` while one is.
    `activations` is the type between the layers; fp8 and int8 products quantise it row by row on their way in.
    """

    storage: str
    wish: str
    compute: Compute
    activations: str
    decode: str
    merge: str
    product: str
    attention: str
    reasons: tuple[Reason, ...]
    rejected: tuple[Reason, ...]


def choose(
    capability: Capability,
    storage: str,
    wish: str = "auto",
    shape: tuple[int, int] | None = None,
    head_dim: int = FLUX_HEAD_DIM,
    attention: str = "auto",
) -> Choice:
    """The choice for weights of a storage format; with a `shape` (out, in), for a layer of that shape alone.

    `attention` is the wish for the attention of a model whose products all run like this one: "auto" or "exact".
    """
    storage = find_format(storage).name
    picked = _pick_compute(capability, storage, require_wish(wish), shape)
    compute = next(known for known in COMPUTES if known == picked.name)
    activations = _activations(capability, compute)
    in_features = FLUX_WIDTH if shape is None else shape[1]
    parts = {
        "decode": decode_backend(capability, storage, compute, in_features),
        "merge": merge_backend(capability, storage, in_features),
        "product": product_backend(capability, compute),
        "attention": attention_backend(capability, activations, head_dim, compute=compute, wish=attention),
    }
    everything = (picked, *parts.values())
    return Choice(
        storage=storage,
        wish=wish,
        compute=compute,
        activations=activations,
        **{part: chosen.name for part, chosen in parts.items()},
        reasons=tuple(each.reason for each in everything),
        rejected=tuple(reason for each in everything for reason in each.rejected),
    )


def as_text(choice: Choice) -> str:
    """The choice as a table of four columns: part, option, whether it was chosen, why."""
    rows = [(reason.part, reason.option, "chosen", reason.text) for reason in choice.reasons]
    rows += [(reason.part, reason.option, "rejected", reason.text) for reason in choice.rejected]
    parts = [reason.part for reason in choice.reasons]
    rows.sort(key=lambda row: parts.index(row[0]))  # stable: the chosen option stays ahead of the rejected ones
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    )


def _activations(capability: Capability, compute: Compute) -> str:
    """fp8 and int8 products give bf16 where the chip has it; a CPU keeps float32 between layers."""
    if compute not in ("fp8", "int8"):
        return compute
    if capability.kind == "cpu":
        return "fp32"
    return "bf16" if capability.generation.bf16 else "fp16"


# the compute type -----------------------------------------------------------------------------------------------------


def _pick_compute(capability: Capability, storage: str, wish: str, shape: tuple[int, int] | None) -> Picked:
    able = [Option(name, "", _unable(capability, name, shape)) for name in COMPUTES]
    if wish in COMPUTES:
        return _as_wished(capability, storage, wish, able)
    order: Sequence[str] = PLAIN_ORDERS.get(storage, COMPUTES)
    order = [*order, *(name for name in COMPUTES if name not in order)]
    by_name = {option.name: option for option in able}
    options = []
    for name in order:
        obstacle = by_name[name].obstacle or _unwanted(capability, storage, name, wish)
        options.append(Option(name, _merit(capability, storage, name), obstacle))
    return pick("compute", options)


def _as_wished(capability: Capability, storage: str, wish: str, able: Sequence[Option]) -> Picked:
    """The wished type, or an error that lists what would work instead and what would not."""
    obstacle = next(option.obstacle for option in able if option.name == wish)
    if obstacle is not None:
        usable = [option.name for option in able if option.obstacle is None]
        others = [f"{option.name}: {option.obstacle}" for option in able if option.obstacle and option.name != wish]
        raise InvalidOptionError(
            f"{storage} weights cannot be computed in {wish} on {capability.chip}.",
            f"{obstacle[:1].upper()}{obstacle[1:]}." + (f" Nor is there {'; '.join(others)}." if others else ""),
            f"Use one of {', '.join(usable)}, or 'auto'.",
        )
    rejected = tuple(
        Reason("compute", option.name, option.obstacle or f"{wish} was asked for")
        for option in able
        if option.name != wish
    )
    return Picked(wish, Reason("compute", wish, "it was asked for by name"), rejected)


def _unable(capability: Capability, compute: str, shape: tuple[int, int] | None) -> str | None:
    """Why the device cannot multiply in a type, or None. A CPU can in every type, at whatever speed."""
    generation = capability.generation
    if capability.kind in ("rocm", "mps") and compute in ("fp8", "int8"):
        return f"no {compute} product is covered on {capability.chip} GPUs"
    has_units = {"fp8": generation.fp8, "int8": generation.int8, "bf16": generation.bf16, "fp16": generation.fp16}
    if capability.kind != "cpu" and not has_units.get(compute, True):
        return f"{capability.chip} {'is not known to have' if generation is LATER else 'has no'} {compute} units"
    return None if shape is None else shape_obstacle(compute, shape)


def _unwanted(capability: Capability, storage: str, compute: str, wish: str) -> str | None:
    """Why a type that the device can multiply in is not what "auto" or "exact" means."""
    if storage in PLAIN_ORDERS and compute not in PLAIN_ORDERS[storage]:
        return f"it would round {storage} weights"
    if wish == "exact" and compute in ("fp8", "int8"):
        return "it rounds the activations to eight bits, and exact was asked for"
    if capability.kind == "cpu" and compute != "fp32":
        return f"fast {compute} products are not to be had on every CPU; used where asked for by name"
    if compute == "int8":
        return _int8_speed(capability)
    return None


def _int8_speed(capability: Capability) -> str:
    if capability.generation.name == "Hopper":
        return "cuBLAS gave 590 to 700 TFLOP/s in int8 against 730 to 785 in bf16 on one H200"
    return f"not measured on {capability.chip}, so not known to be faster; used where asked for by name"


def _fp8_speed(capability: Capability) -> str:
    if capability.generation.name == "Hopper":
        return "1190 to 1440 TFLOP/s against 730 to 785 in bf16 on one H200"
    return f"its fp8 units have twice the rate of its bf16 units by the data sheet; not measured on {capability.chip}"


def _merit(capability: Capability, storage: str, compute: str) -> str:
    """What speaks for a type that nothing forbids."""
    if compute == "fp8":
        return _fp8_speed(capability)
    if compute == storage:
        return f"it holds {storage} weights as they are"
    if compute == "fp32":
        return "it holds every stored value, and every device multiplies in it"
    if (storage, compute) == ("bf16", "fp16"):
        return "it holds bf16 weights from 6.1e-5 to 65504 as they are, and this chip has no bf16 units"
    return "the widest range of the 16-bit types" if compute == "bf16" else f"{capability.chip} has no bf16 units"
