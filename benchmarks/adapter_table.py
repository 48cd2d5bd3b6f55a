"""Which adapter files load: every family in every spelling, read and attached by Gossamer and by diffusers.

    python benchmarks/adapter_table.py --out benchmarks/results           the record, as JSON
    python benchmarks/adapter_table.py --write docs/adapters.md           and the table in the docs, from that run

Both get the same tensors, for every module that a file of that spelling has, and a full-size FLUX.1-dev with both text
encoders on the meta device: names, shapes and the loaders' own code are real, values are not computed. A row counts the
changes in the file by what they change: a linear's weight, its magnitude, its bias, or a norm. A change that has not
arrived after loading was dropped; `said` is what the loader warned of. Whether what arrived is right is not looked at
here: the tests do that for Gossamer.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxControlPipeline, FluxPipeline, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from adapter_table_files import SPEC, Change, Row, Tensors, in_memory, rows
from gossamer.adapters import Adapter, DecomposedTerm, LinearTerm, attach
from gossamer.adapters.read import build_adapter
from gossamer.adapters.spelling import recognise
from gossamer.bench.random_flux import FLUX_DEV
from gossamer.bench.record import stamp, write_record
from gossamer.formats import Packed
from gossamer.layers import QuantLinear

BEGIN, END = "<!-- adapter-table: begin -->", "<!-- adapter-table: end -->"


# models ---------------------------------------------------------------------------------------------------------------


def encoders() -> dict[str, nn.Module]:
    clip = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    t5 = T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
    return {"text_encoder": CLIPTextModel(clip), "text_encoder_2": T5EncoderModel(t5)}


def swap(model: nn.Module) -> nn.Module:
    """The model with QuantLinears that have shapes and no values; `quantize` wants values."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear):
            owner, _, child = name.rpartition(".")
            values = torch.empty_like(linear.weight, dtype=torch.bfloat16)
            packed = Packed("bf16", {"values": values}, (linear.out_features, linear.in_features))
            setattr(model.get_submodule(owner), child, QuantLinear(packed, linear.bias))
    return model


def canonical(component: str, name: str) -> str:
    """transformers 5 has CLIP's modules without `text_model.`."""
    rootless = component == "text_encoder" and not name.startswith("text_model.")
    return f"text_model.{name}" if rootless else name


# the two loaders ------------------------------------------------------------------------------------------------------


def by_gossamer(tensors: Tensors, row: Row) -> set[Change]:
    """What is on the model after attaching."""
    found = recognise(list(tensors), SPEC)
    if found.left_over:
        raise ValueError(f"{len(found.left_over)} keys are left over, such as {found.left_over[0]!r}")
    adapter = build_adapter(found, tensors, SPEC, {})
    with torch.device("meta"):
        model, texts = swap(FluxTransformer2DModel.from_config(FLUX_DEV)), encoders()
        for text in texts.values():
            swap(text)
        attach(model, adapter, "row", 1.0, texts)
    changes = set[Change]()
    for component, module in {"transformer": model, **texts}.items():
        for name, layer in module.named_modules():
            if isinstance(layer, QuantLinear) and "row" in layer.names():
                known = canonical(component, name)
                changes |= {(component, known, kind) for kind in _kinds(_term(adapter, component, known))}
    return (
        changes
        | {(of, name, "norm") for of, norm in adapter.norm_differences.items() for name in norm}
        | {("transformer", name, "norm") for name in adapter.replacements}
    )


def _term(adapter: Adapter, component: str, linear: str) -> LinearTerm:
    return (adapter.terms if component == "transformer" else adapter.text[component])[linear]


def _kinds(term: LinearTerm) -> list[str]:
    kinds = ["weight"] if len(term.shape) == 2 else []
    kinds += ["magnitude"] if isinstance(term, DecomposedTerm) else []
    return kinds + (["bias"] if term.bias is not None else [])


def by_diffusers(tensors: Tensors, row: Row) -> set[Change]:
    """What PEFT's layers hold after `load_lora_weights`."""
    with torch.device("meta"):
        parts = {"transformer": FluxTransformer2DModel.from_config(FLUX_DEV), **encoders()}
    rest = dict.fromkeys(("vae", "tokenizer", "tokenizer_2"))
    pipe = (FluxControlPipeline if row.control else FluxPipeline)(
        scheduler=FlowMatchEulerDiscreteScheduler(), **parts, **rest
    )
    with missing_from_peft() as missing:
        pipe.load_lora_weights(in_memory(tensors), adapter_name="row")
    changes = set[Change]()
    for component, module in parts.items():
        for name, layer in module.named_modules():
            changes |= {(component, canonical(component, name), kind) for kind in _peft_kinds(name, layer, missing)}
    norms = getattr(parts["transformer"], "_transformer_norm_layers", None) or {}
    return changes | {("transformer", name, "norm") for name in norms}


def _peft_kinds(name: str, layer: nn.Module, missing: set[str]) -> list[str]:
    """What PEFT has for a layer and got values for."""
    if "row" not in getattr(layer, "lora_B", {}):
        return []
    parameters = {
        "weight": "lora_B.row.weight",
        "bias": "lora_B.row.bias",
        "magnitude": "lora_magnitude_vector.row.weight",
    }
    there = {of for of, _ in layer.named_parameters()}
    return [kind for kind, of in parameters.items() if of in there and f"{name}.{of}" not in missing]


@contextmanager
def missing_from_peft() -> Iterator[set[str]]:
    """Names of parameters that PEFT made and that got no values from the file, as PEFT itself reports them."""
    import peft

    missing, original = set[str](), peft.set_peft_model_state_dict

    def listening(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        missing.update(key for key in result.missing_keys if "lora" in key)
        return result

    peft.set_peft_model_state_dict = listening
    try:
        yield missing
    finally:
        peft.set_peft_model_state_dict = original


def in_one_order(message: str) -> str:
    """Sets in a message come in another order in every process."""
    listed = re.compile(r"\{('[^{}]*')\}")
    return listed.sub(lambda found: "{" + ", ".join(sorted(found[1].split(", "))) + "}", message)


@contextmanager
def heard() -> Iterator[list[str]]:
    """Warnings of diffusers meanwhile."""
    messages: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    listener, logger = Listener(logging.WARNING), logging.getLogger("diffusers")
    logger.addHandler(listener)
    try:
        yield messages
    finally:
        logger.removeHandler(listener)


def outcome(load: Callable[[Tensors, Row], set[Change]], row: Row) -> dict[str, Any]:
    """How many of the file's changes have arrived, or the error."""
    tensors, changes = row.make()
    with heard() as messages, warnings.catch_warnings():
        try:
            warnings.simplefilter("ignore")  # of values that a meta device does not keep
            arrived = load(tensors, row) & changes
        except Exception as error:  # noqa: BLE001 - what a loader raises is the result
            return {"outcome": "error", "error": type(error).__name__, "message": in_one_order(str(error))[:300]}
    kinds: dict[str, list[int]] = {}
    for change in changes:
        counts = kinds.setdefault(change[2], [0, 0])
        counts[0] += change in arrived
        counts[1] += 1
    result = {"outcome": "all" if arrived == changes else "part", "arrived": len(arrived), "of": len(changes)}
    return {**result, "by_kind": dict(sorted(kinds.items())), "said": [message[:300] for message in messages]}


# the table ------------------------------------------------------------------------------------------------------------


def cell(result: Mapping[str, Any]) -> str:
    if result["outcome"] == "error":
        return f"error: {result['error']}"
    if result["outcome"] == "all":
        return f"all {result['of']}"
    kinds = sorted(result["by_kind"].items())
    missing = [f"{total - done} {NAMES[kind]}" for kind, (done, total) in kinds if done < total]
    return f"{result['arrived']} of {result['of']}, without {' and '.join(missing)}; {said(result.get('said', []))}"


NAMES = {"weight": "weights", "magnitude": "magnitudes", "bias": "biases", "norm": "norms"}


def said(messages: list[str]) -> str:
    """In a word, what the loader said of it."""
    if not messages:
        return "silent"
    return '"safe to ignore"' if all("safe to ignore" in message for message in messages) else "warns"


def table(record: Mapping[str, Any]) -> str:
    versions = record["versions"]
    lines = [
        f"| family | spelling | example key | Gossamer | diffusers {versions['diffusers']} |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        cells = (row["family"], row["spelling"], f"`{row['example']}`", cell(row["gossamer"]), cell(row["diffusers"]))
        lines.append("| " + " | ".join(cells) + " |")
    where = f"{record['date']}, diffusers {versions['diffusers']}, peft {record['peft']}, torch {versions['torch']}"
    return "\n".join([*lines, "", f"Run on {where}."])


def write_table(path: Path, text: str) -> None:
    page = path.read_text("utf-8")
    found = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    if len(found.findall(page)) != 1:
        sys.exit(f"{path} has no place for the table between {BEGIN} and {END}")
    path.write_text(found.sub(lambda _: f"{BEGIN}\n{text}\n{END}", page), "utf-8")


def main() -> None:
    import peft

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--write", type=Path, help="a page to put the table into")
    parser.add_argument("--only", default="", help="rows whose family or spelling has this in it")
    options = parser.parse_args()
    record = {**stamp(torch.device("cpu")), "peft": peft.__version__, "rows": []}
    for row in rows():
        if options.only not in f"{row.family} {row.spelling}":
            continue
        tensors, _ = row.make()
        entry = {"family": row.family, "spelling": row.spelling, "keys": len(tensors), "example": next(iter(tensors))}
        entry |= {"gossamer": outcome(by_gossamer, row), "diffusers": outcome(by_diffusers, row)}
        record["rows"].append(entry)
        print(f"{row.family:32} {row.spelling:34} {cell(entry['gossamer']):24} {cell(entry['diffusers'])}", flush=True)
        write_record(options.out / f"adapter_table-{record['date']}.json", record)
    if options.write is not None:
        write_table(options.write, table(record))


if __name__ == "__main__":
    main()
