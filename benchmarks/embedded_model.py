"""What each storage format does to the embedded model: bytes, likeness to fp32, adherence to captions, adapters.

    PYTHONPATH=src python benchmarks/embedded_model.py --device cuda --out benchmarks/results --grid grid.png

Every row paints the same held-out captions from the same noise and computes in float32 without TF32, so that rows
differ by storage alone. Picture i has seed i. The result is one JSON file, written anew after every row.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from gossamer.adapters.adapter import Adapter
from gossamer.adapters.attach import attach, detach
from gossamer.adapters.read import read_adapter
from gossamer.bench.adherence import CAPTION_SEED, adherence, held_out_captions
from gossamer.bench.batches import BatchSettings, paint_batches
from gossamer.bench.likeness import likeness
from gossamer.bench.record import record_path, stamp, write_record
from gossamer.demo.captions import Caption
from gossamer.demo.edges import edge_agreement, edge_map
from gossamer.demo.embedded import adapter_paths, model_folder
from gossamer.demo.reader import load_reader
from gossamer.demo.reader_net import ReaderNet
from gossamer.demo.render import pack_scenes, render
from gossamer.demo.scene import Scene
from gossamer.demo.styles import STYLES, style_score
from gossamer.errors import FileMissingError, GossamerError
from gossamer.formats import find_format
from gossamer.models.flux import from_diffusers
from gossamer.models.swap import quantize, weight_bytes
from gossamer.pipeline.components import StorageChoice, load_components, pick_device, storage_plan
from gossamer.pipeline.model import Model, open_folder
from gossamer.pipeline.quiet import quiet_loading

REFERENCE = "fp32"
CONTROL = "edges"
STORAGES = "fp32,bf16,fp8,fp8_e5m2,int8,nf4,nf4-dq,fp4,Q8_0,Q6_K,Q5_K,Q5_0,Q4_K,Q4_0,Q3_K,Q2_K"
ADAPTER_CAPTIONS = 48
SWEEP_STEPS, SWEEP_GUIDANCE = (4, 8, 20, 28), (1.0, 2.0, 3.5, 5.0, 7.0)
GRID_STORAGE, GRID_COLUMNS = "nf4", 6
RENDER_CHUNK = 8


@dataclass(frozen=True, eq=False)
class Bench:
    """Everything that the rows share. `parts` lacks the transformer; `transformer` is unpacked, float32, on the CPU."""

    device: torch.device
    model: Model
    parts: Mapping[str, Any]
    transformer: Any
    adapters: Mapping[str, Adapter]
    reader: ReaderNet
    captions: Sequence[Caption]
    settings: BatchSettings

    def packed(self, storage: str) -> Any:
        """A copy of the transformer on the device, its linears stored as `gossamer.load` would store them."""
        transformer = copy.deepcopy(self.transformer)
        plan = storage_plan(StorageChoice(storage, REFERENCE), self.model.stored["transformer"])
        quantize(transformer, plan, compute=torch.float32)
        return transformer.to(self.device)

    def paint(
        self, transformer: Any, captions: Sequence[Caption], first_seed: int = 0, control: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Pictures of captions, the first with `first_seed`, each next one with the next."""
        parts = {**self.parts, "transformer": transformer}
        seeds = range(first_seed, first_seed + len(captions))
        return paint_batches(parts, [one.text for one in captions], seeds, self.settings, control)

    def paint_adapted(
        self, transformer: Any, name: str, captions: Sequence[Caption], first_seed: int = 0
    ) -> torch.Tensor:
        """The same with an adapter at scale 1; the Control LoRA gets the edges of the captions' own scenes."""
        attach(transformer, self.adapters[name], name)
        try:
            return self.paint(transformer, captions, first_seed, self.edges(captions) if name == CONTROL else None)
        finally:
            detach(transformer, name)

    def edges(self, captions: Sequence[Caption]) -> torch.Tensor:
        """Edge maps (B, 3, side, side) of the renderer's pictures."""
        scenes = pack_scenes([one.scene for one in captions], self.device)
        return edge_map(render(scenes, self.settings.side, chunk=RENDER_CHUNK))

    @property
    def adapter_captions(self) -> Sequence[Caption]:
        """The captions that adapters are measured with."""
        return self.captions[:ADAPTER_CAPTIONS]


def set_up(arguments: argparse.Namespace) -> Bench:
    """Load everything once; the components besides the transformer compute in float32 too."""
    device = pick_device(arguments.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    model = open_folder(arguments.model)
    text = model.stored["text_encoder_2"]
    parts = dict(load_components(model, StorageChoice(REFERENCE, text), torch.device("cpu")).parts)
    del parts["transformer"]
    for name in ("vae", "text_encoder", "text_encoder_2"):
        parts[name].to(device)
    batch = arguments.batch or (100 if device.type == "cuda" else 4)
    return Bench(
        device=device,
        model=model,
        parts=parts,
        transformer=load_transformer(model.homes["transformer"]),
        adapters=load_adapters(arguments.adapters, model),
        reader=load_reader().to(device),
        captions=held_out_captions(arguments.captions),
        settings=BatchSettings(batch, max_sequence_length=model.profile.max_sequence_length),
    )


def load_transformer(path: Path) -> Any:
    """The transformer in float32, with our forward, as `gossamer.load` runs it."""
    with quiet_loading():
        from diffusers import FluxTransformer2DModel

        model = FluxTransformer2DModel.from_pretrained(
            path, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    return from_diffusers(model).eval().requires_grad_(False)


def load_adapters(folder: Path | None, model: Model) -> dict[str, Adapter]:
    """The bundled adapters, or those of the same names in another folder."""
    paths = adapter_paths() if folder is None else {path.stem: path for path in folder.glob("*.safetensors")}
    missing = [name for name in (*STYLES, CONTROL) if name not in paths]
    if missing:
        raise FileMissingError(
            f"The adapters {', '.join(missing)} are not there.",
            f"Found: {', '.join(paths) or 'none'}.",
            "Give a folder that holds all three with --adapters.",
        )
    return {name: read_adapter(paths[name], model.spec) for name in (*STYLES, CONTROL)}


# rows


@dataclass(frozen=True, eq=False)
class Painted:
    """The pictures of one row: of all captions, and by adapter of the first ones."""

    plain: torch.Tensor
    adapted: Mapping[str, torch.Tensor]


def paint_row(bench: Bench, transformer: Any) -> Painted:
    """All pictures that a row is measured from."""
    return Painted(
        bench.paint(transformer, bench.captions),
        {name: bench.paint_adapted(transformer, name, bench.adapter_captions) for name in bench.adapters},
    )


def measure_row(bench: Bench, painted: Painted, reference: Painted) -> dict[str, Any]:
    """Likeness to the reference, adherence, and each adapter's effect."""
    maps = bench.edges(bench.adapter_captions)
    plain = painted.plain[: len(maps)]

    def effect(name: str, pictures: torch.Tensor) -> torch.Tensor:
        return edge_agreement(pictures, maps) if name == CONTROL else style_score(pictures, name)

    return {
        "likeness": likeness(painted.plain, reference.plain),
        "adherence": adherence(bench.captions, painted.plain, bench.reader),
        "three_objects": three_objects(bench, painted.plain),
        "adapters": {
            name: {
                "measure": "edge_agreement" if name == CONTROL else "style_score",
                "without": float(effect(name, plain).mean()),
                "with": float(effect(name, pictures).mean()),
                "likeness": likeness(pictures, reference.adapted[name]),
            }
            for name, pictures in painted.adapted.items()
        },
    }


def three_objects(bench: Bench, pictures: torch.Tensor) -> dict[str, Any]:
    """Adherence in scenes of three objects: where two share a shape or a colour, and where all differ in both."""
    groups: dict[str, list[int]] = {"alike": [], "apart": []}
    for place, asked in enumerate(bench.captions):
        if len(asked.scene.solids) == 3:
            groups["alike" if alike(asked.scene) else "apart"].append(place)
    return {
        name: adherence([bench.captions[place] for place in places], pictures[places], bench.reader)
        for name, places in groups.items()
        if places
    }


def alike(scene: Scene) -> bool:
    """Whether two objects of a scene have the same shape or the same colour."""
    shapes, colours = {solid.shape for solid in scene.solids}, {solid.colour for solid in scene.solids}
    return min(len(shapes), len(colours)) < len(scene.solids)


def storage_row(bench: Bench, storage: str, reference: Painted | None) -> tuple[dict[str, Any], Painted]:
    """One storage format measured against the reference; the first row is its own."""
    started = time.perf_counter()
    transformer = bench.packed(storage)
    painted = paint_row(bench, transformer)
    measured = measure_row(bench, painted, reference or painted)
    seconds = time.perf_counter() - started
    return {"storage": storage, "weight_bytes": weight_bytes(transformer), "seconds": seconds, **measured}, painted


def sweep_rows(bench: Bench) -> list[dict[str, Any]]:
    """Adherence of the reference by number of steps, and by guidance."""
    transformer = bench.packed(REFERENCE)
    usual = bench.settings
    varied = [replace(usual, steps=steps) for steps in SWEEP_STEPS]
    varied += [replace(usual, guidance=guidance) for guidance in SWEEP_GUIDANCE if guidance != usual.guidance]
    rows = []
    for settings in varied:
        pictures = replace(bench, settings=settings).paint(transformer, bench.captions)
        graded = adherence(bench.captions, pictures, bench.reader)
        rows.append({"steps": settings.steps, "guidance": settings.guidance, "adherence": graded})
    return rows


# the grid


def write_grid(bench: Bench, path: Path) -> None:
    """Twelve plain pictures, three of each style, three control maps each with its picture; captions in a JSON file."""
    transformer = bench.packed(GRID_STORAGE)
    captions = held_out_captions(21)
    groups = {"plain": range(12), STYLES[0]: range(12, 15), STYLES[1]: range(15, 18), CONTROL: range(18, 21)}
    tiles: list[torch.Tensor] = []
    texts: list[dict[str, Any]] = []
    for name, places in groups.items():
        chosen = captions[places.start : places.stop]
        adapted = name in bench.adapters
        pictures = (
            bench.paint_adapted(transformer, name, chosen, places.start)
            if adapted
            else bench.paint(transformer, chosen, places.start)
        )
        maps = bench.edges(chosen) if name == CONTROL else [None] * len(chosen)
        for seed, asked, drawing, picture in zip(places, chosen, maps, pictures, strict=True):
            about = {"caption": asked.text, "seed": seed, "adapter": name if adapted else None}
            if drawing is not None:
                tiles.append(drawing)
                texts.append({**about, "shows": "control map"})
            tiles.append(picture)
            texts.append({**about, "shows": "picture"})
    as_image(tiles).save(path)
    path.with_suffix(".json").write_text(json.dumps(texts, indent=1) + "\n", "utf-8")


def as_image(tiles: Sequence[torch.Tensor]) -> Image.Image:
    """Tiles (3, side, side) in [0, 1] in rows of `GRID_COLUMNS`."""
    rows = torch.stack(list(tiles)).unflatten(0, (-1, GRID_COLUMNS))  # (row, column, 3, side, side)
    sheet = rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)  # (row side, column side, 3)
    return Image.fromarray(sheet.mul(255).round().to(torch.uint8).cpu().numpy())


# the record


def describe(bench: Bench) -> dict[str, Any]:
    """Machine, versions, date and settings of the run."""
    usual = bench.settings
    return {
        **stamp(bench.device),
        "settings": {
            "captions": len(bench.captions),
            "caption_seed": CAPTION_SEED,
            "adapter_captions": len(bench.adapter_captions),
            "seeds": "picture i has seed i",
            "steps": usual.steps,
            "guidance": usual.guidance,
            "side": usual.side,
            "max_sequence_length": usual.max_sequence_length,
            "batch": usual.batch,
            "compute": "float32 in every row, TF32 off, on every device; pictures are compared before 8-bit rounding",
            "text_storage": bench.model.stored["text_encoder_2"],
            "weight_bytes": "whole transformer in memory, its biases and norm scales in float32",
            "model_sha256": bench.model.hashes(),
            "adapters_sha256": {name: adapter.sha256 for name, adapter in bench.adapters.items()},
        },
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The storage rows as text."""
    head = ("storage", "MB", "dB", "min dB", "SSIM", "objects", "relations", "exact", *STYLES, CONTROL)
    lines = [head, *(table_line(row) for row in rows)]
    return "\n".join("  ".join(cell.rjust(9) for cell in line) for line in lines)


def table_line(row: Mapping[str, Any]) -> tuple[str, ...]:
    """One row's cells; an adapter's effect is without > with."""
    like, graded, adapters = row["likeness"], row["adherence"], row["adapters"]
    return (
        row["storage"],
        f"{row['weight_bytes'] / 1e6:.2f}",
        number(like["psnr_mean"], "same"),
        number(like["psnr_min"], "same"),
        f"{like['ssim_mean']:.4f}",
        *(number(graded[share], "none") for share in ("objects", "relations", "exact")),
        *(f"{adapters[name]['without']:.2f}>{adapters[name]['with']:.2f}" for name in (*STYLES, CONTROL)),
    )


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The sweep's rows as text."""
    lines = [("steps", "guidance", "objects", "relations", "exact")]
    for row in rows:
        shares = (number(row["adherence"][share], "none") for share in ("objects", "relations", "exact"))
        lines.append((str(row["steps"]), f"{row['guidance']:g}", *shares))
    return "\n".join("  ".join(cell.rjust(9) for cell in line) for line in lines)


def number(value: float | None, otherwise: str) -> str:
    """A value with one digit behind the point."""
    return otherwise if value is None else f"{value:.1f}"


def storages(text: str) -> list[str]:
    """Format names from a list with commas; the reference always comes first."""
    names = [find_format(name.strip()).name for name in text.split(",")]
    return list(dict.fromkeys([REFERENCE, *names]))


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure the embedded model in many storage formats.")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--captions", type=positive, default=300, metavar="N")
    parser.add_argument("--storages", default=STORAGES, metavar="LIST", help="names with commas; fp32 is always first")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR")
    parser.add_argument("--batch", type=positive, help="pictures at a time (default: 100 on CUDA, 4 on a CPU)")
    parser.add_argument("--grid", metavar="FILE", help="also write a grid of pictures: a .png inside --out")
    parser.add_argument("--sweep", action="store_true", help="also grade fp32 by steps and by guidance")
    parser.add_argument("--model", type=Path, default=model_folder(), metavar="FOLDER")
    parser.add_argument("--adapters", type=Path, metavar="FOLDER", help="default: the bundled ones")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Measure, write, print."""
    arguments = parse(argv)
    names = storages(arguments.storages)
    arguments.out.mkdir(parents=True, exist_ok=True)
    bench = set_up(arguments)
    record: dict[str, Any] = {**describe(bench), "rows": []}
    path = record_path(arguments.out, "embedded_model", record)
    reference: Painted | None = None
    for name in names:
        row, painted = storage_row(bench, name, reference)
        reference = reference or painted
        record["rows"].append(row)
        write_record(path, record)
        print(f"{name}: {row['seconds']:.1f} s", file=sys.stderr, flush=True)
    if arguments.grid:
        write_grid(bench, arguments.out / arguments.grid)
    if arguments.sweep:
        record["sweep"] = sweep_rows(bench)
        write_record(path, record)
        print(sweep_table(record["sweep"]), end="\n\n")
    print(table(record["rows"]))
    print(path)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except GossamerError as error:
        sys.exit(f"{type(error).code}: {error}")
