"""Training data made on the spot: scenes sampled by all cores, captions tokenised, pictures rendered on the GPU."""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTokenizer, T5TokenizerFast

from architecture import PICTURE_SIZE
from drawing import compiler, to_bytes
from gossamer.demo.captions import caption
from gossamer.demo.look import pack_scenes
from gossamer.demo.render import render
from gossamer.demo.scene import Scene, sample_split
from gossamer.demo.styles import render_styled

CHUNK = 250


@dataclass(frozen=True)
class Example:
    """A scene and a few different captions of it."""

    scene: Scene
    texts: tuple[str, ...]


def _chunk(job: tuple[int, int, tuple[float, ...] | None]) -> list[Example]:
    seed, wordings, shares = job
    rng = random.Random(seed)
    scenes = [sample_split(rng, False, rng.choices((1, 2, 3), shares)[0] if shares else None) for _ in range(CHUNK)]
    return [Example(scene, tuple(caption(scene, rng).text for _ in range(wordings))) for scene in scenes]


def sample_examples(
    count: int, first_seed: int, wordings: int = 1, shares: tuple[float, ...] | None = None
) -> list[Example]:
    """`count` scenes of the training split; the forked processes never touch CUDA."""
    jobs = [(first_seed + index, wordings, shares) for index in range(-(-count // CHUNK))]
    processes = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        return [example for chunk in pool.map(_chunk, jobs, chunksize=1) for example in chunk][:count]


@dataclass(frozen=True)
class Tokens:
    """Token ids of every wording: CLIP (N, wordings, 77) and T5 (N, wordings, T)."""

    clip: Tensor
    t5: Tensor

    def pick(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """One random wording for each of `rows`."""
        wording = torch.randint(self.clip.shape[1], rows.shape, device=rows.device, generator=generator)
        return self.clip[rows, wording], self.t5[rows, wording]


def tokenize(
    texts: Sequence[str], tokenizers: tuple[CLIPTokenizer, T5TokenizerFast], t5_length: int
) -> tuple[Tensor, Tensor]:
    """Padded ids as diffusers' FluxPipeline makes them: (N, 77) and (N, t5_length)."""
    clip, t5 = tokenizers
    common = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return (
        clip(list(texts), max_length=clip.model_max_length, **common).input_ids,
        t5(list(texts), max_length=t5_length, **common).input_ids,
    )


def tokenize_examples(
    examples: Sequence[Example], tokenizers: tuple[CLIPTokenizer, T5TokenizerFast], t5_length: int, device: torch.device
) -> Tokens:
    """Token ids of all wordings, on the GPU."""
    wordings = len(examples[0].texts)
    clip, t5 = tokenize([text for example in examples for text in example.texts], tokenizers, t5_length)
    return Tokens(clip.view(len(examples), wordings, -1).to(device), t5.view(len(examples), wordings, -1).to(device))


@torch.no_grad()
def encode(pictures: Tensor, autoencoder: AutoencoderKL, chunk: int = 128) -> Tensor:
    """Packed, normalised latents (N, 256, 64) in bf16 of pictures (N, 3, 256, 256) uint8."""
    latents = []
    for part in pictures.split(chunk):
        with torch.autocast(part.device.type, torch.bfloat16):
            mean = autoencoder.encode(to_model(part)).latent_dist.mean
        scaled = (mean.float() - autoencoder.config.shift_factor) * autoencoder.config.scaling_factor
        latents.append(pack(scaled).bfloat16())
    return torch.cat(latents)


def to_model(pictures: Tensor) -> Tensor:
    """uint8 pictures to float in [-1, 1]."""
    return pictures.float() / 127.5 - 1.0


def pack(latents: Tensor) -> Tensor:
    """(N, C, H, W) to FLUX's tokens (N, H/2 * W/2, 4C): each token is a 2x2 patch, channels outermost."""
    n, c, h, w = latents.shape
    return latents.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


def draw(examples: Sequence[Example], style: str | None, device: torch.device, chunk: int = 16) -> Tensor:
    """Pictures (N, 3, 256, 256) uint8; N is rounded down to a multiple of `chunk`, so that shapes stay fixed."""
    compiled = compiler(device.type == "cuda")
    whole = len(examples) - len(examples) % chunk
    pictures = torch.empty(whole, 3, PICTURE_SIZE, PICTURE_SIZE, dtype=torch.uint8, device=device)
    for start in range(0, whole, chunk):
        batch = pack_scenes([example.scene for example in examples[start : start + chunk]], device)
        drawn = (
            render(batch, compile=compiled, chunk=chunk)
            if style is None
            else render_styled(batch, style, compile=compiled, chunk=chunk)
        )
        pictures[start : start + chunk] = to_bytes(drawn)
    return pictures
