"""Step 4 of the recipe: one adapter on the frozen base model; pencil and neon are styles, edges is the Control LoRA.

    python training/train_adapter.py pencil --base runs/base/base.safetensors --vae runs/vae/vae.safetensors \
        --out runs/pencil

The target is the flow velocity of the styled (or edge-conditioned) picture plus the base model's own guidance
difference, so that guidance goes on working with the adapter attached. Trained through
PEFT; written as PEFT's raw state.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from architecture import TEXT_TOKENS, load_tokenizers
from common import Average, Log, Team, TimeBox, batches, join_team, require_finite, share_gradients, time_boxed
from data import Example, draw, encode, sample_examples, tokenize_examples
from denoiser import UNGUIDED, Denoiser, mix, sample_guidance, sample_sigma
from drawing import to_bytes
from gossamer.demo.edges import edge_map
from train_transformer import load_autoencoder

PICTURE_STREAM = (
    r"x_embedder"
    r"|transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))"
    r"|single_transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v)|proj_mlp|proj_out)"
)
NORMS = ("norm_q.weight", "norm_k.weight")
# kohya's fused q, k, v and mlp share one file entry of four times the rank, and a style is to stay within rank 16
RANKS = {"pencil": 8, "neon": 4, "edges": 8}
INPUT_RANK = 32  # of the widened input layer, which reads all of the control picture
SETTLE = 40  # steps before the speed is measured, and steps that measure it


@dataclass(frozen=True)
class Options:
    """Settings of a run."""

    adapter: str
    base: Path
    vae: Path
    tokenizers: Path
    out: Path
    seconds: float
    scenes: int
    batch: int
    rate: float
    compile: bool


@dataclass(frozen=True)
class Pair:
    """Latents (N, 256, 64) to paint, and the control latents of the same shape where there is a control picture."""

    latents: Tensor
    control: Tensor | None


def make_pair(options: Options, examples: list[Example], team: Team) -> Pair:
    """Renders and encodes the adapter's pictures."""
    autoencoder = load_autoencoder(options.vae).to(team.device, memory_format=torch.channels_last)
    if options.adapter != "edges":
        return Pair(encode(draw(examples, options.adapter, team.device), autoencoder), None)
    pictures = draw(examples, None, team.device)
    edges = torch.cat([to_bytes(edge_map(part.float() / 255)) for part in pictures.split(64)])
    return Pair(encode(pictures, autoencoder), encode(edges, autoencoder))


def widen(layer: nn.Linear, width: int) -> nn.Linear:
    """The same linear over more inputs; the new columns are zero."""
    wide = nn.Linear(width, layer.out_features, device=layer.weight.device)
    with torch.no_grad():
        wide.weight.zero_()
        wide.weight[:, : layer.in_features] = layer.weight
        wide.bias.copy_(layer.bias)
    return wide


def attach(options: Options, transformer: nn.Module) -> list[nn.Parameter]:
    """Adds the trainable low-rank terms (for edges: a wider input, biases and norm scales too) and returns them."""
    transformer.requires_grad_(False)
    control = options.adapter == "edges"
    if control:
        transformer.x_embedder = widen(transformer.x_embedder, 2 * transformer.x_embedder.in_features)
    rank, wider = RANKS[options.adapter], {"x_embedder": INPUT_RANK} if control else {}
    config = LoraConfig(r=rank, lora_alpha=rank, rank_pattern=wider, alpha_pattern=wider, target_modules=PICTURE_STREAM)
    config.lora_bias = control
    transformer.add_adapter(config)
    for name, parameter in transformer.named_parameters():
        if control and name.endswith(NORMS):
            parameter.requires_grad_(True)
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def train(options: Options) -> None:
    """Trains until the time is used up and writes `<adapter>.safetensors`."""
    team = join_team()
    options.out.mkdir(parents=True, exist_ok=True)
    log = Log(options.out / f"{options.adapter}.jsonl", team)
    examples = sample_examples(options.scenes, first_seed=5_000_000, wordings=4)
    pair = make_pair(options, examples, team)
    tokens = tokenize_examples(
        examples[: len(pair.latents)], load_tokenizers(options.tokenizers), TEXT_TOKENS, team.device
    )
    log.write(event="data", latents=len(pair.latents))
    torch.manual_seed(0)
    model = Denoiser(options.tokenizers).to(team.device)
    model.load_state_dict(load_file(options.base), strict=True)
    model.requires_grad_(False)
    base = copy.deepcopy(model.transformer)
    parameters = attach(options, model.transformer)
    average = fit(options, team, log, (pair, tokens), Parts(model, base, parameters))
    average.store()
    state = get_peft_model_state_dict(model.transformer)
    norms = {n: p for n, p in model.transformer.named_parameters() if n.endswith(NORMS) and p.requires_grad}
    save_file(
        {n: p.detach().contiguous() for n, p in {**state, **norms}.items()},
        options.out / f"{options.adapter}.safetensors",
    )
    log.write(event="done", tensors=len(state) + len(norms))


@dataclass(frozen=True)
class Parts:
    """The model with the adapter, the untouched base transformer, and what is trained."""

    model: Denoiser
    base: nn.Module
    parameters: list[nn.Parameter]


def fit(options: Options, team: Team, log: Log, data: tuple, parts: Parts) -> Average:
    """The loop; returns the averaged weights."""
    pair, tokens = data
    model, device = parts.model, team.device
    fast = torch.compile(model.transformer, dynamic=False) if options.compile else model.transformer
    base = torch.compile(parts.base, dynamic=False) if options.compile else parts.base
    holder = nn.ParameterList(parts.parameters)
    average, optimizer = (
        Average(holder, 0.998),
        torch.optim.AdamW(holder.parameters(), betas=(0.9, 0.99), weight_decay=0.0),
    )
    generator = torch.Generator(device).manual_seed(99)
    box = TimeBox(options.seconds, options.rate, warmup=50, settle=SETTLE)
    indices = batches(len(pair.latents), options.batch, generator, device)
    for step, rows in zip(time_boxed(box, team), indices, strict=False):
        sigma, guidance = sample_sigma(len(rows), generator, device), sample_guidance(len(rows), generator, device)
        noisy, velocity = mix(pair.latents[rows].float(), sigma, generator)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                text = model.read(*tokens.pick(rows, generator))
                with_guidance = model.velocity(noisy, sigma, text, guidance, base)
                without = model.velocity(noisy, sigma, text, torch.full_like(sigma, UNGUIDED), base)
            seen = noisy if pair.control is None else torch.cat([noisy, pair.control[rows].float()], dim=-1)
            predicted = model.velocity(seen, sigma, text, guidance, fast)
        loss = (predicted.float() - velocity - (with_guidance - without).float()).square().mean()
        loss.backward()
        share_gradients(parts.parameters, team)
        for group in optimizer.param_groups:
            group["lr"] = step.rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update()
        if step.number % 100 == 0:
            log.write(step=step.number, left=step.left, loss=require_finite(loss, step.number))
    return average


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", choices=("pencil", "neon", "edges"))
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--tokenizers", type=Path, default=Path("src/gossamer/demo/model"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--scenes", type=int, default=8_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    train(Options(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
