"""Train the scene reader from scratch: sample scenes, render them, train, validate, store.

    python training/train_reader.py --device cuda --out outputs/reader

takes about two and a half minutes on an H200 and leaves in --out `reader.safetensors`, which belongs into
src/gossamer/demo/, and `reader.json` with the validation. Training sees only the training side of the split of scenes;
validation looks at fresh pictures of both sides. Training ends by the clock, so two runs differ a little; --steps with
ample --seconds and --render-seconds makes them alike.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from degrade import blot_out, degrade
from gossamer.demo.grade import grade, summarize
from gossamer.demo.reader import THRESHOLD, Reading, SeenSolid, decode, load_reader
from gossamer.demo.reader_net import GRID, SPLIT, ReaderNet, Unit, split_maps
from gossamer.demo.scene import Scene, Solid
from reader_data import Targets, mirrored, render_bytes, renderer, sample_scenes, targets_of

SPREAD = 1.2  # cells: standard deviation of the heat around a centre
HEAT_START = -4.0  # logit of the heat before training: about 2 % of the cells near a centre
PEAK_RATE, DECAY = 4e-3, 0.02
WARM_UP = 0.05  # share of the training
BLOTTED = 1 / 32  # share of pictures blurred beyond recognition, where nothing is to be found
THRESHOLDS = (0.25, 0.3, 0.5, 0.6)  # beside the one in use
LOOKS = ("shape", "colour", "size", "material")
SAME_PLACE = 0.5  # world units within which a seen object is the true one


@dataclass(frozen=True)
class Limits:
    """When training ends: after `seconds`, or after `steps` where there is such a limit."""

    seconds: float
    steps: int | None

    def progress(self, start: float, step: int) -> float:
        """0 at the start of training, 1 or more at its end."""
        by_steps = step / self.steps if self.steps else 0.0
        return max((time.monotonic() - start) / self.seconds, by_steps)


def heat_target(targets: Targets) -> Tensor:
    """(B, shapes, GRID, GRID): a Gaussian around each object's centre cell, exactly 1 there."""
    lines = torch.arange(GRID, device=targets.cell.device)
    row, column = targets.cell.floor()[..., None].unbind(2)  # (B, 3, 1) each
    along = torch.exp(-0.5 * ((lines - row) / SPREAD).square())
    across = torch.exp(-0.5 * ((lines - column) / SPREAD).square())
    bumps = along[..., :, None] * across[..., None, :] * targets.present[..., None, None]  # (B, 3, GRID, GRID)
    shapes = functional.one_hot(targets.shape, SPLIT[0])[..., None, None]
    return (bumps[:, :, None] * shapes).amax(dim=1)


def heat_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Focal loss in the manner of CenterNet, summed: cells near a centre count less as background."""
    chance = logits.sigmoid()
    hit = (1 - chance).square() * functional.logsigmoid(logits)
    miss = (1 - target) ** 4 * chance.square() * functional.logsigmoid(-logits)
    return -torch.where(target == 1, hit, miss).sum()


def at_centres(values: Tensor, targets: Targets) -> Tensor:
    """(B, C, GRID, GRID) to (B, 3, 9, C): the values in the 3x3 cells around each centre."""
    near = torch.arange(-1, 2, device=values.device)
    row, column = targets.cell.floor().long().unbind(-1)  # (B, 3) each
    rows = (row[..., None, None] + near[:, None]).clamp(0, GRID - 1)
    columns = (column[..., None, None] + near).clamp(0, GRID - 1)
    index = (rows * GRID + columns).flatten(1)  # (B, 27)
    picked = values.flatten(2).gather(2, index[:, None].expand(-1, values.shape[1], -1))
    return picked.unflatten(2, (index.shape[1] // 9, 9)).permute(0, 2, 3, 1)


def loss_of(output: Tensor, targets: Targets) -> Tensor:
    """Heat over all cells, and looks and place around the centres, per object; nothing waits for the device."""
    maps = split_maps(output)
    share = targets.present[..., None].expand(-1, -1, 9) / (9 * targets.present.sum().clamp_min(1))  # of each cell

    def named(logits: Tensor, labels: Tensor) -> Tensor:
        near = at_centres(logits, targets)
        wanted = labels[..., None].expand(near.shape[:3])
        surprise = functional.cross_entropy(near.flatten(0, 2), wanted.flatten(), reduction="none")
        return (surprise * share.flatten()).sum()

    places = at_centres(maps.place, targets)
    apart = functional.smooth_l1_loss(places, targets.place[:, :, None].expand_as(places), beta=0.1, reduction="none")
    looks = named(maps.colour, targets.colour) + 0.3 * named(maps.size, targets.size)
    looks = looks + 0.1 * named(maps.material, targets.material)
    heat = heat_loss(maps.heat, heat_target(targets)) / targets.present.sum().clamp_min(1)
    return heat + looks + 2.0 * (apart.sum(dim=-1) * share).sum()


def batch_of(pictures: Tensor, targets: Targets, size: int, rng: random.Random) -> tuple[Tensor, Targets]:
    """A random batch: half of it mirrored, most of it flawed, a few pictures blotted out."""
    index = torch.randint(len(pictures), (size,), device=pictures.device)
    chosen, found = pictures[index].float() / 255, targets[index]
    flipped, found_there = mirrored(chosen, found)
    flip = torch.rand(size, device=pictures.device) < 0.5
    chosen = torch.where(flip[:, None, None, None], flipped, chosen)
    found = replace(
        found,
        cell=torch.where(flip[:, None, None], found_there.cell, found.cell),
        place=torch.where(flip[:, None, None], found_there.place, found.place),
    )
    blotted = round(size * BLOTTED)
    flawed = degrade(chosen, rng)
    if blotted:
        flawed[:blotted] = blot_out(chosen[:blotted])
        found.present[:blotted] = False  # indexing made a copy
    return flawed, found


def train(pictures: Tensor, targets: Targets, limits: Limits, batch: int, rng: random.Random) -> tuple[ReaderNet, int]:
    """A network trained with batch normalisation, and the number of steps it took."""
    device = pictures.device
    net = beginner().to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=PEAK_RATE, weight_decay=DECAY)
    start, step = time.monotonic(), 0
    while (progress := limits.progress(start, step)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * rate(progress)
        flawed, found = batch_of(pictures, targets, batch, rng)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            output = net(flawed.contiguous(memory_format=torch.channels_last))
        loss = loss_of(output, found)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step:5d}  {time.monotonic() - start:6.1f} s  loss {loss.item():.4f}", flush=True)
        step += 1
    return net.eval(), step


def beginner() -> ReaderNet:
    """An untrained network with batch normalisation that sees next to nothing anywhere."""
    net = ReaderNet()
    for unit in units(net):
        unit.norm = nn.BatchNorm2d(unit.conv.out_channels)
    last = net.head[-1]
    nn.init.normal_(last.weight, std=0.01)
    nn.init.zeros_(last.bias)
    nn.init.constant_(last.bias[: SPLIT[0]], HEAT_START)
    return net


def rate(progress: float) -> float:
    """Share of the peak learning rate: a short rise, then half a cosine down to nothing."""
    if progress < WARM_UP:
        return max(progress / WARM_UP, 0.01)
    return 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


def units(net: ReaderNet) -> list[Unit]:
    return [module for module in net.modules() if isinstance(module, Unit)]


def store(net: ReaderNet, path: Path) -> None:
    """Fold the normalisation into the convolutions and write fp16."""
    for unit in units(net):
        unit.conv = fuse_conv_bn_eval(unit.conv.float(), unit.norm)
        unit.norm = nn.Identity()
    path.write_bytes(save({name: tensor.half().cpu().contiguous() for name, tensor in net.state_dict().items()}))


@torch.inference_mode()
def outputs_of(net: ReaderNet, pictures: Tensor, rng: random.Random | None = None) -> Tensor:
    """The network's output for pictures as bytes, with flaws where there is an `rng`."""
    outputs = []
    for chunk in pictures.split(64):
        floats = chunk.float() / 255
        outputs.append(net(floats if rng is None else degrade(floats, rng)).cpu())
    return torch.cat(outputs)


def attributes(scenes: Sequence[Scene], readings: Sequence[Reading]) -> dict[str, float]:
    """Shares in per cent of true objects that were found where they are, and of those with each attribute right."""
    both = zip(scenes, readings, strict=True)
    pairs = [(solid, nearest(solid, reading)) for scene, reading in both for solid in scene.solids]
    found = [(solid, seen) for solid, seen in pairs if seen is not None]
    shares = {"found": 100 * len(found) / len(pairs)}
    for name in LOOKS:
        right = sum(getattr(solid, name) == getattr(seen, name) for solid, seen in found)
        shares[name] = 100 * right / max(len(found), 1)
    return shares


def nearest(solid: Solid, reading: Reading) -> SeenSolid | None:
    """The seen object whose place is nearest to the solid's, if that is near enough."""

    def distance(seen: SeenSolid) -> float:
        return math.dist((seen.x, seen.z, seen.base), (solid.x, solid.z, solid.base))

    near = [seen for seen in reading.objects if distance(seen) < SAME_PLACE]
    return min(near, key=distance, default=None)


def validation(net: ReaderNet, scenes: Sequence[Scene], pictures: Tensor, rng: random.Random) -> dict[str, object]:
    """How right the reader is on clean pictures, at several thresholds, and on flawed ones."""

    def judged(readings: list[Reading]) -> dict[str, object]:
        grades = [grade(scene, reading) for scene, reading in zip(scenes, readings, strict=True)]
        return {**summarize(grades), "attributes": attributes(scenes, readings)}

    outputs = {"clean": outputs_of(net, pictures), "flawed": outputs_of(net, pictures, rng)}
    report: dict[str, object] = {kind: judged(decode(output)) for kind, output in outputs.items()}
    for kind, output in outputs.items():
        report[f"{kind} by threshold"] = {str(at): judged(decode(output, at)) for at in THRESHOLDS}
    return report


def table(report: dict[str, dict[str, dict[str, object]]]) -> str:
    """The validation as a few lines of text: shares in per cent, and the number of extra objects."""
    heads = "".join(f"{name:>9}" for name in ("found", *LOOKS))
    lines = [f"{'pictures':<17}{'objects':>9}{'relations':>11}{'exact':>8}{'extra':>7}" + heads]
    for split in ("training side", "held-out side"):
        for kind in ("clean", "flawed"):
            row = report[split][kind]
            looks = "".join(f"{row['attributes'][name]:9.2f}" for name in ("found", *LOOKS))
            numbers = f"{row['objects']:9.2f}{row['relations']:11.2f}{row['exact']:8.2f}{row['extra']:7d}"
            lines.append(f"{split.split()[0]:<9} {kind:<8}{numbers}{looks}")
    return "\n".join(lines)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--pictures", type=int, default=60_000, help="training pictures to render")
    parser.add_argument("--render-seconds", type=float, default=50.0, help="go on with fewer pictures after this time")
    parser.add_argument("--seconds", type=float, default=80.0, help="training time")
    parser.add_argument("--steps", type=int, help="end earlier, after this many steps")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=16, help="scenes rendered at a time")
    parser.add_argument("--samples", type=int, default=2, help="rays a pixel, each way")
    parser.add_argument("--validation", type=int, default=2000, help="pictures, half of them of held-out combinations")
    parser.add_argument("--no-compile", action="store_true", help="render without torch.compile")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    chosen = options()
    chosen.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    scenes = sample_scenes(chosen.pictures, held=False, seed=chosen.seed)
    checks = {
        "training side": sample_scenes(chosen.validation // 2, held=False, seed=chosen.seed + 1),
        "held-out side": sample_scenes(chosen.validation // 2, held=True, seed=chosen.seed + 1),
    }
    print(f"{time.monotonic() - start:6.1f} s  sampled {len(scenes)} scenes", flush=True)

    torch.manual_seed(chosen.seed)
    torch.backends.cudnn.benchmark = True
    rng = random.Random(chosen.seed)
    draw = renderer(chosen.device, chosen.samples, compiled=not chosen.no_compile)
    shown = {name: render_bytes(part, draw, chosen.chunk, math.inf) for name, part in checks.items()}
    print(f"{time.monotonic() - start:6.1f} s  rendered {chosen.validation} pictures for validation", flush=True)
    pictures = render_bytes(scenes, draw, chosen.chunk, chosen.render_seconds)
    print(f"{time.monotonic() - start:6.1f} s  rendered {len(pictures)} pictures for training", flush=True)

    targets = targets_of(scenes[: len(pictures)], chosen.device)
    net, steps = train(pictures, targets, Limits(chosen.seconds, chosen.steps), chosen.batch, rng)
    print(f"{time.monotonic() - start:6.1f} s  trained {steps} steps of {chosen.batch}", flush=True)

    path = chosen.out / "reader.safetensors"
    store(net, path)
    stored = load_reader(path).to(chosen.device)
    report = {name: validation(stored, checks[name], shown[name], rng) for name in checks}
    made = {"pictures": len(pictures), "steps": steps, "batch": chosen.batch, "seed": chosen.seed}
    versions = {"torch": torch.__version__, "device": str(chosen.device)}
    record = {"training": made | versions, "threshold": THRESHOLD, "validation": report}
    (chosen.out / "reader.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{time.monotonic() - start:6.1f} s  validated; {path.stat().st_size} bytes\n")
    print(table(report))


if __name__ == "__main__":
    main()
