"""Step 3 of the recipe: text encoders and transformer, from scratch; the last part distils guidance into its embedder.

    torchrun --nproc-per-node 4 training/train_transformer.py --vae runs/vae/vae.safetensors --out runs/base
    python training/train_transformer.py ...        # one GPU; give it four times the seconds
    torchrun ... --weights runs/flow/flow.safetensors --shares 1,2,7 --rate 6e-4   # goes on, mostly with three objects

It may be started beside step 2: it renders its pictures first and waits for the autoencoder. First phase: flow matching
on latents, one caption in ten empty. Second phase, from the average of the first: the student is shown guidance values
and learns the frozen first model's classifier-free guided velocity (Meng et al., 2022, as FLUX.1-dev).
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from architecture import TEXT_TOKENS, build_autoencoder, load_tokenizers
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
from data import Tokens, draw, encode, sample_examples, tokenize, tokenize_examples
from denoiser import UNGUIDED, Denoiser, Text, guided, mix, sample_guidance, sample_sigma

LONG_TEXT = 512  # diffusers' default length; a few steps see it so that extra padding does no harm
LONG_EVERY = 16
SETTLE = 40  # steps before the speed is measured, and steps that measure it


@dataclass(frozen=True)
class Options:
    """Settings of a run; the two times are for the training phases alone."""

    vae: Path
    tokenizers: Path
    out: Path
    weights: Path | None
    shares: tuple[float, ...] | None
    first_seed: int
    seconds: float
    distil_seconds: float
    scenes: int
    batch: int
    rate: float
    optimizer: str
    compile: bool


@dataclass(frozen=True)
class Data:
    """Latents (N, 256, 64), their captions' ids at both lengths, and the empty caption's ids."""

    latents: Tensor
    tokens: Tokens
    empty: tuple[Tensor, Tensor]
    pad: int


def make_data(options: Options, team: Team) -> Data:
    """Renders this process's share of the training scenes and, as soon as the autoencoder is there, encodes them."""
    tokenizers = load_tokenizers(options.tokenizers)
    examples = sample_examples(
        options.scenes, options.first_seed + team.rank * 100_000, wordings=4, shares=options.shares
    )
    pictures = draw(examples, None, team.device)
    while not options.vae.exists():
        time.sleep(1)
    latents = encode(pictures, load_autoencoder(options.vae).to(team.device, memory_format=torch.channels_last))
    tokens = tokenize_examples(examples[: len(latents)], tokenizers, TEXT_TOKENS, team.device)
    empty_clip, empty_t5 = (ids.to(team.device) for ids in tokenize([""], tokenizers, TEXT_TOKENS))
    return Data(latents, tokens, (empty_clip, empty_t5), tokenizers[1].pad_token_id)


def load_autoencoder(path: Path) -> nn.Module:
    """The trained autoencoder: step 2's file, or the shipped diffusers folder, so that step 2 need not run again."""
    if path.is_dir():
        return AutoencoderKL.from_pretrained(path).float().eval().requires_grad_(False)
    autoencoder = build_autoencoder()
    autoencoder.load_state_dict(load_file(path))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    autoencoder.register_to_config(shift_factor=float(metadata["shift"]), scaling_factor=float(metadata["scale"]))
    return autoencoder.eval().requires_grad_(False)


def is_block_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon updates it: the matrices of the transformer's blocks."""
    return parameter.ndim == 2 and "blocks." in name


class Phase:
    """One training phase: a time box, and the generator of its randomness."""

    def __init__(self, name: str, options: Options, team: Team, log: Log, box: TimeBox) -> None:
        self.name, self.options, self.team, self.log, self.box = name, options, team, log, box
        self.generator = torch.Generator(team.device).manual_seed(1234 + team.rank)

    def run(self, model: nn.Module, average: Average, count: int, loss_of: Callable[[int, Tensor], Tensor]) -> None:
        """Calls `loss_of(step, rows)` until the time is used up."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = Optimizer(model, self.options.optimizer, is_block_matrix)
        indices = batches(count, self.options.batch, self.generator, self.team.device)
        for step, rows in zip(time_boxed(self.box, self.team), indices, strict=False):
            loss = loss_of(step.number, rows)
            loss.backward()
            norm = share_gradients(parameters, self.team)
            optimizer.step(step.rate)
            for parameter in parameters:
                parameter.grad = None
            average.update()
            if step.number in (1, 10) or step.number % 250 == 0:
                values = {"loss": require_finite(loss, step.number), "norm": require_finite(norm, step.number)}
                self.log.write(phase=self.name, step=step.number, of=step.total, left=step.left, **values)


def pad_to(ids: Tensor, length: int, pad: int) -> Tensor:
    """Token ids with more padding at the end."""
    return torch.nn.functional.pad(ids, (0, length - ids.shape[1]), value=pad)


def drop(ids: Tensor, empty: Tensor, dropped: Tensor) -> Tensor:
    """Ids with the empty caption's wherever `dropped`."""
    return torch.where(dropped[:, None], empty.expand_as(ids), ids)


def first_phase(options: Options, team: Team, log: Log, data: Data, model: Denoiser) -> None:
    """Flow matching from scratch; leaves the average in the model."""
    phase = Phase("flow", options, team, log, TimeBox(options.seconds, options.rate, hold=0.4, settle=SETTLE))
    average = Average(model, 0.9995)
    fast = compiled(model.transformer, options)

    def loss_of(step: int, rows: Tensor) -> Tensor:
        long = step % LONG_EVERY == LONG_EVERY - 1
        rows = rows[: len(rows) // 4] if long else rows
        clip_ids, t5_ids = data.tokens.pick(rows, phase.generator)
        dropped = torch.rand(len(rows), device=team.device, generator=phase.generator) < 0.1
        clip_ids, t5_ids = drop(clip_ids, data.empty[0], dropped), drop(t5_ids, data.empty[1], dropped)
        t5_ids = pad_to(t5_ids, LONG_TEXT, data.pad) if long else t5_ids
        sigma = sample_sigma(len(rows), phase.generator, team.device)
        noisy, velocity = mix(data.latents[rows].float(), sigma, phase.generator)
        with torch.autocast(team.device.type, torch.bfloat16):
            text = model.read(clip_ids, t5_ids)
            predicted = model.velocity(noisy, sigma, text, torch.full_like(sigma, UNGUIDED), None if long else fast)
        return (predicted.float() - velocity).square().mean()

    phase.run(model, average, len(data.latents), loss_of)
    average.store()


def second_phase(options: Options, team: Team, log: Log, data: Data, model: Denoiser) -> None:
    """Distils classifier-free guidance of the frozen first model into the guidance embedder; the text encoders stay."""
    box = TimeBox(options.distil_seconds, 0.4 * options.rate, hold=0.2, settle=SETTLE)
    phase = Phase("distil", options, team, log, box)
    model.clip.requires_grad_(False)
    model.t5.requires_grad_(False)
    teacher = compiled(copy.deepcopy(model.transformer).requires_grad_(False), options)
    average = Average(model.transformer, 0.999)
    fast = compiled(model.transformer, options)
    with torch.autocast(team.device.type, torch.bfloat16), torch.no_grad():
        nothing = model.read(*data.empty)

    def loss_of(step: int, rows: Tensor) -> Tensor:
        long = step % LONG_EVERY == LONG_EVERY - 1
        rows = rows[: len(rows) // 4] if long else rows
        clip_ids, t5_ids = data.tokens.pick(rows, phase.generator)
        sigma = sample_sigma(len(rows), phase.generator, team.device)
        guidance = sample_guidance(len(rows), phase.generator, team.device)
        noisy, _ = mix(data.latents[rows].float(), sigma, phase.generator)
        with torch.autocast(team.device.type, torch.bfloat16):
            with torch.no_grad():
                text = model.read(clip_ids, t5_ids)
                wanted = teach(model, teacher, noisy, sigma, (text, nothing), guidance)
                text = model.read(clip_ids, pad_to(t5_ids, LONG_TEXT, data.pad)) if long else text
            predicted = model.velocity(noisy, sigma, text, guidance, None if long else fast)
        return (predicted.float() - wanted).square().mean()

    phase.run(model.transformer, average, len(data.latents), loss_of)
    average.store()


def teach(
    model: Denoiser, teacher: nn.Module, noisy: Tensor, sigma: Tensor, texts: tuple[Text, Text], guidance: Tensor
) -> Tensor:
    """The frozen model's guided velocity."""
    text, nothing = texts
    off = torch.full_like(sigma, UNGUIDED)
    empty = Text(nothing.tokens.expand_as(text.tokens).contiguous(), nothing.pooled.expand_as(text.pooled).contiguous())
    conditional = model.velocity(noisy, sigma, text, off, teacher)
    unconditional = model.velocity(noisy, sigma, empty, off, teacher)
    return guided(conditional.float(), unconditional.float(), guidance)


def compiled(module: nn.Module, options: Options) -> nn.Module:
    """The module compiled for fixed shapes, where compiling is asked for."""
    return torch.compile(module, dynamic=False) if options.compile else module


def train(options: Options) -> None:
    """Both phases; writes `flow.safetensors` after the first and `base.safetensors` after the second."""
    team = join_team()
    options.out.mkdir(parents=True, exist_ok=True)
    log = Log(options.out / "transformer.jsonl", team)
    data = make_data(options, team)
    log.write(
        event="data",
        latents=len(data.latents),
        mean=data.latents.float().mean().item(),
        std=data.latents.float().std().item(),
    )
    torch.manual_seed(0)
    model = Denoiser(options.tokenizers).to(team.device)
    if options.weights:
        model.load_state_dict(load_file(options.weights))
    first_phase(options, team, log, data, model)
    save(options.out / "flow.safetensors", model, team)
    second_phase(options, team, log, data, model)
    save(options.out / "base.safetensors", model, team)
    log.write(event="done")


def save(path: Path, model: Denoiser, team: Team) -> None:
    """The weights, from the leading process."""
    if team.leads:
        save_file(
            {name: value.clone().contiguous() for name, value in model.state_dict().items()}, path
        )  # tied ones apart


def shares(text: str) -> tuple[float, ...]:
    """Three numbers with commas."""
    numbers = tuple(float(part) for part in text.split(","))
    if len(numbers) != 3:
        raise argparse.ArgumentTypeError("must be three numbers with commas")
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True, help="step 2's file, or the shipped folder model/vae")
    parser.add_argument("--tokenizers", type=Path, default=Path("src/gossamer/demo/model"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="weights of an earlier run's first phase to go on from")
    parser.add_argument("--shares", type=shares, help="how often 1, 2 and 3 objects; default: as scenes are sampled")
    parser.add_argument("--first-seed", type=int, default=0, help="of the scenes; another run takes others")
    parser.add_argument("--seconds", type=float, default=500.0)
    parser.add_argument("--distil-seconds", type=float, default=90.0)
    parser.add_argument("--scenes", type=int, default=56_000, help="for each GPU")
    parser.add_argument("--batch", type=int, default=256, help="for each GPU")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    train(Options(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
