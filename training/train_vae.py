"""Step 2 of the recipe: the autoencoder, on plain, styled and edge-map pictures.

    python training/train_vae.py --seconds 240 --out runs/vae

Loss: L1, squared error, L1 of finite differences at three scales (sharp outlines), a small KL term, and for a quarter
of the pictures the same on latents halved in size (latents that behave under scaling are easier to denoise: Kouzelis et
al., 2025, "EQ-VAE"). Most steps see crops where there is contrast; the last ones see whole pictures.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as functional
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from architecture import build_autoencoder
from common import (
    Average,
    Log,
    Optimizer,
    Team,
    TimeBox,
    batches,
    join_team,
    require_finite,
    share_gradients,
    time_boxed,
)
from data import draw, sample_examples, to_model
from drawing import to_bytes
from gossamer.demo.edges import edge_map

KL_WEIGHT = 5e-4
EDGE_WEIGHT = 2.0
SCALED_WEIGHT = 0.25
CROP = 128  # most of the training sees crops, chosen where something is to be seen
CROP_STRIDE = 32
WHOLE_FROM = 0.88  # share of the steps after which whole pictures are trained on


@dataclass(frozen=True)
class Options:
    """Settings of a run."""

    seconds: float
    out: Path
    pictures: int
    batch: int
    rate: float
    optimizer: str
    compile: bool


class Reconstruction(nn.Module):
    """The training loss as one module, so that it compiles as one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.vae = build_autoencoder()

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, mean squared error in [-1, 1] units, and KL per latent value, of float pictures (B, 3, H, W)."""
        posterior = self.vae.encode(pictures).latent_dist
        latent = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
        restored = self.vae.decode(latent).sample.float()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).float().mean()
        part = max(1, pictures.shape[0] // 4)
        scaled = self.vae.decode(functional.avg_pool2d(latent[:part], 2)).sample.float()
        loss = difference(restored, pictures) + SCALED_WEIGHT * difference(
            scaled, functional.avg_pool2d(pictures[:part], 2)
        )
        return loss + KL_WEIGHT * kl, (restored - pictures).square().mean(), kl


def difference(restored: Tensor, wanted: Tensor) -> Tensor:
    """L1 of values and, at three scales, of finite differences."""
    error = restored - wanted
    total = error.abs().mean() + error.square().mean()
    for _ in range(3):
        total = total + EDGE_WEIGHT * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 3
        error = functional.avg_pool2d(error, 2)
    return total


def make_pictures(options: Options, team: Team) -> Tensor:
    """Plain, pencil, neon and edge-map pictures in the ratio 12 : 3 : 3 : 2, as uint8 on the GPU."""
    unit = options.pictures // 20
    examples = sample_examples(18 * unit, first_seed=1_000_000 + team.rank * 100_000)
    plain = draw(examples[: 12 * unit], None, team.device)
    edges = torch.cat([to_bytes(edge_map(part.float() / 255)) for part in plain[: 2 * unit].split(64)])
    styled = [
        draw(examples[(12 + 3 * i) * unit : (15 + 3 * i) * unit], style, team.device)
        for i, style in enumerate(("pencil", "neon"))
    ]
    return torch.cat([plain, *styled, edges])


def train(options: Options) -> None:
    """Trains for the given time and writes `vae.safetensors`, its latents' mean and scale in the metadata."""
    team = join_team()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    log = Log(options.out / "vae.jsonl", team)
    pictures = make_pictures(options, team)
    log.write(event="pictures", count=len(pictures))
    model = Reconstruction().to(team.device, memory_format=torch.channels_last)
    average = Average(model, 0.999)
    optimizer = Optimizer(model, options.optimizer, is_kernel)
    run(options, team, log, pictures, Trainer(model, average, optimizer))
    average.store()
    finish(options, team, log, pictures, model)


@dataclass(frozen=True)
class Trainer:
    """A model, its average and its optimiser."""

    model: Reconstruction
    average: Average
    optimizer: Optimizer


def run(options: Options, team: Team, log: Log, pictures: Tensor, trainer: Trainer) -> None:
    """The loop; after a warm-up the number of steps is fixed from the measured speed."""
    forward = torch.compile(trainer.model, dynamic=False) if options.compile else trainer.model
    parameters = list(trainer.model.parameters())
    generator = torch.Generator(team.device).manual_seed(team.rank)
    box = TimeBox(options.seconds, options.rate, warmup=100, settle=30)
    indices = batches(len(pictures), options.batch, generator, team.device)
    for step, rows in zip(time_boxed(box, team), indices, strict=False):
        whole = step.done > WHOLE_FROM
        batch = pictures[rows[: max(1, len(rows) // 4)]] if whole else crops(pictures[rows], generator)
        with torch.autocast(team.device.type, torch.bfloat16):
            batch = to_model(batch).contiguous(memory_format=torch.channels_last)
            loss, squared, kl = (trainer.model if whole else forward)(batch)
        loss.backward()
        share_gradients(parameters, team)
        trainer.optimizer.step(step.rate)
        for parameter in parameters:
            parameter.grad = None
        trainer.average.update()
        if step.number % 200 == 0:
            value = require_finite(loss, step.number)
            log.write(step=step.number, left=step.left, loss=value, psnr=psnr(squared), kl=kl.item())


def is_kernel(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon updates it: all matrices and convolutions but those next to the pixels."""
    return parameter.ndim >= 2 and "conv_in" not in name and "decoder.conv_out" not in name


def crops(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """One crop (B, 3, CROP, CROP) of each picture (B, 3, H, W) uint8, likelier where there is contrast."""
    grey = pictures.float().mean(1, keepdim=True)
    contrast = grey.diff(dim=-1, append=grey[..., -1:]).abs() + grey.diff(dim=-2, append=grey[..., -1:, :]).abs()
    activity = functional.avg_pool2d(contrast, CROP, CROP_STRIDE)
    columns = activity.shape[-1]
    odds = activity.flatten(1) + 0.2 * activity.mean((1, 2, 3))[:, None] + 1e-3
    place = torch.multinomial(odds, 1, generator=generator)
    side = torch.arange(CROP, device=pictures.device)
    rows = (place // columns * CROP_STRIDE + side)[:, :, None]
    across = (place % columns * CROP_STRIDE + side)[:, None, :]
    batch = torch.arange(len(pictures), device=pictures.device)[:, None, None]
    return pictures.permute(0, 2, 3, 1)[batch, rows, across].permute(0, 3, 1, 2)


def psnr(squared: Tensor) -> float:
    """Peak signal-to-noise ratio in dB from the mean squared error in [-1, 1] units."""
    return -10 * torch.log10(squared.detach() / 4).item()


@torch.no_grad()
def finish(options: Options, team: Team, log: Log, pictures: Tensor, model: Reconstruction) -> None:
    """Validates on fresh scenes, measures the latents' scale and writes the weights."""
    if not team.leads:
        return
    model.eval()
    some = pictures[torch.randperm(len(pictures), device=pictures.device)[:1024]]
    with torch.autocast(team.device.type, torch.bfloat16):
        means = torch.cat([model.vae.encode(to_model(part)).latent_dist.mean.float() for part in some.split(64)])
    shift, scale = means.mean().item(), 1.0 / means.std().item()
    fresh = draw(sample_examples(max(16, min(256, len(pictures) // 20)), first_seed=9_000_000), None, team.device)
    restored = torch.cat([restore(model, part) for part in fresh.split(32)])
    log.write(event="done", fresh_psnr=psnr((restored - to_model(fresh)).square().mean()), shift=shift, scale=scale)
    weights = {name: value.contiguous() for name, value in model.vae.state_dict().items()}
    partial = options.out / "vae.partial"  # step 3 may be waiting for the whole file
    save_file(weights, partial, metadata={"shift": str(shift), "scale": str(scale)})
    partial.replace(options.out / "vae.safetensors")
    rows = torch.cat(
        [fresh[:8], to_bytes((restored[:8] + 1) / 2), some[:16], to_bytes((restore(model, some[:16]) + 1) / 2)]
    )
    save_grid(rows, 8, options.out / "vae.png")


def restore(model: Reconstruction, pictures: Tensor) -> Tensor:
    """Pictures after encoding and decoding, in [-1, 1]."""
    return model.vae.decode(model.vae.encode(to_model(pictures)).latent_dist.mean).sample


def save_grid(pictures: Tensor, columns: int, path: Path) -> None:
    """uint8 pictures (N, 3, H, W) as one PNG of rows."""
    n, _, h, w = pictures.shape
    grid = (
        pictures.view(n // columns, columns, 3, h, w).permute(0, 3, 1, 4, 2).reshape(n // columns * h, columns * w, 3)
    )
    Image.fromarray(grid.cpu().numpy()).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240.0, help="training time after the pictures are drawn")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=16_000, help="for each GPU")
    parser.add_argument("--batch", type=int, default=48, help="for each GPU")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    train(Options(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
