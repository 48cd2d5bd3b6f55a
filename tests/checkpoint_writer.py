"""Writes the embedded model, or names and shapes of a full-size one, in the layouts that FLUX.1 files are found in.

Nothing here uses the package: names and row orders are a table of their own, and bytes come from safetensors, the gguf
package and bitsandbytes. `tests/checkpoints/test_layouts.py` checks the table against diffusers' own conversions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1, "I8": 1, "I64": 8}
PREFIX = "model.diffusion_model."

Entries = dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape by name

# BFL's module, and the diffusers modules that its rows are, from the first row on
STREAMS = (
    ("img", "norm1", ("to_q", "to_k", "to_v"), "to_out.0", "ff", ("norm_q", "norm_k")),
    ("txt", "norm1_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context",
     ("norm_added_q", "norm_added_k")),
)  # fmt: skip


def bfl_modules(double: int, single: int, guidance: bool) -> dict[str, tuple[str, ...]]:
    """Diffusers modules by BFL module; the last layer's modulation, whose halves change places, is not among them."""
    modules: dict[str, tuple[str, ...]] = {
        "img_in": ("x_embedder",),
        "txt_in": ("context_embedder",),
        "final_layer.linear": ("proj_out",),
    }
    embedders = {"time_in": "timestep_embedder", "vector_in": "text_embedder"}
    for bfl, name in {**embedders, **({"guidance_in": "guidance_embedder"} if guidance else {})}.items():
        for ours, theirs in (("in_layer", "linear_1"), ("out_layer", "linear_2")):
            modules[f"{bfl}.{ours}"] = (f"time_text_embed.{name}.{theirs}",)
    for i in range(double):
        for stream, norm, qkv, out, mlp, _ in STREAMS:
            bfl, name = f"double_blocks.{i}.{stream}", f"transformer_blocks.{i}"
            modules[f"{bfl}_mod.lin"] = (f"{name}.{norm}.linear",)
            modules[f"{bfl}_attn.qkv"] = tuple(f"{name}.attn.{part}" for part in qkv)
            modules[f"{bfl}_attn.proj"] = (f"{name}.attn.{out}",)
            modules[f"{bfl}_mlp.0"] = (f"{name}.{mlp}.net.0.proj",)
            modules[f"{bfl}_mlp.2"] = (f"{name}.{mlp}.net.2",)
    for i in range(single):
        bfl, name = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        modules[f"{bfl}.modulation.lin"] = (f"{name}.norm.linear",)
        parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        modules[f"{bfl}.linear1"] = tuple(f"{name}.{part}" for part in parts)
        modules[f"{bfl}.linear2"] = (f"{name}.proj_out",)
    return modules


def bfl_norms(double: int, single: int) -> dict[str, str]:
    """Diffusers' name of each norm scale by BFL's."""
    norms = {}
    for i in range(double):
        for stream, *_, pair in STREAMS:
            for kind, name in zip(("query", "key"), pair, strict=True):
                key = f"double_blocks.{i}.{stream}_attn.norm.{kind}_norm.scale"
                norms[key] = f"transformer_blocks.{i}.attn.{name}.weight"
    for i in range(single):
        for kind, name in (("query", "norm_q"), ("key", "norm_k")):
            norms[f"single_blocks.{i}.norm.{kind}_norm.scale"] = f"single_transformer_blocks.{i}.attn.{name}.weight"
    return norms


def depth(names: Iterable[str]) -> tuple[int, int]:
    """Double and single blocks among diffusers names."""
    split = [name.split(".") for name in names]
    double = 1 + max((int(p[1]) for p in split if p[0] == "transformer_blocks"), default=-1)
    return double, 1 + max((int(p[1]) for p in split if p[0] == "single_transformer_blocks"), default=-1)


def to_bfl(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A transformer with diffusers names under BFL's."""
    double, single = depth(state)
    guidance = any("guidance_embedder" in name for name in state)
    named = {}
    for leaf in ("weight", "bias"):
        for bfl, parts in bfl_modules(double, single, guidance).items():
            named[f"{bfl}.{leaf}"] = torch.cat([state[f"{part}.{leaf}"] for part in parts])
        scale, shift = state[f"norm_out.linear.{leaf}"].chunk(2)
        named[f"final_layer.adaLN_modulation.1.{leaf}"] = torch.cat((shift, scale))
    return named | {bfl: state[name] for bfl, name in bfl_norms(double, single).items()}


def from_bfl(named: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The way back, for values that were changed meanwhile; `like` has the diffusers names and shapes."""
    double, single = depth(like)
    guidance = any("guidance_embedder" in name for name in like)
    state = {name: named[bfl] for bfl, name in bfl_norms(double, single).items()}
    for leaf in ("weight", "bias"):
        for bfl, parts in bfl_modules(double, single, guidance).items():
            pieces = named[f"{bfl}.{leaf}"].split([like[f"{part}.{leaf}"].shape[0] for part in parts])
            state |= {f"{part}.{leaf}": piece for part, piece in zip(parts, pieces, strict=True)}
        shift, scale = named[f"final_layer.adaLN_modulation.1.{leaf}"].chunk(2)
        state[f"norm_out.linear.{leaf}"] = torch.cat((scale, shift))
    return state


def to_latent_diffusion(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An autoencoder with diffusers names under those of BFL's ae.safetensors."""
    return {_latent_diffusion_name(name): _as_convolution(name, tensor) for name, tensor in state.items()}


def _latent_diffusion_name(name: str) -> str:
    parts = name.split(".")
    if parts[1] == "mid_block":
        if parts[2] == "resnets":
            return ".".join((parts[0], "mid", f"block_{int(parts[3]) + 1}", *parts[4:]))
        leaf = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}[parts[4]]
        return f"{parts[0]}.mid.attn_1.{leaf}.{parts[-1]}"
    if parts[1] in ("down_blocks", "up_blocks"):
        way = parts[1].removesuffix("_blocks")
        level = int(parts[2]) if way == "down" else 3 - int(parts[2])
        if parts[3] == "resnets":
            leaf = parts[5].replace("conv_shortcut", "nin_shortcut")
            return f"{parts[0]}.{way}.{level}.block.{parts[4]}.{leaf}.{parts[-1]}"
        return f"{parts[0]}.{way}.{level}.{way}sample.conv.{parts[-1]}"
    return name.replace("conv_norm_out", "norm_out")


def _as_convolution(name: str, tensor: torch.Tensor) -> torch.Tensor:
    is_linear = ".attentions." in name and tensor.dim() == 2
    return tensor[:, :, None, None] if is_linear else tensor


def read_component(folder: Path, component: str) -> dict[str, torch.Tensor]:
    """All tensors of a component folder."""
    files = sorted((folder / component).glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def all_in_one(
    folder: Path,
    transformer: str = PREFIX,
    clip: str = "text_encoders.clip_l.transformer.",
    t5: str = "text_encoders.t5xxl.transformer.",
    vae: str = "vae.",
) -> dict[str, torch.Tensor]:
    """A whole model as ComfyUI saves it, or with other prefixes."""
    parts = {
        transformer: to_bfl(read_component(folder, "transformer")),
        clip: read_component(folder, "text_encoder"),
        t5: read_component(folder, "text_encoder_2"),
        vae: to_latent_diffusion(read_component(folder, "vae")),
    }
    return {f"{prefix}{name}": tensor for prefix, tensors in parts.items() for name, tensor in tensors.items()}


# files ----------------------------------------------------------------------------------------------------------------


def save(path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """A safetensors file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def save_shards(folder: Path, tensors: Mapping[str, torch.Tensor], stem: str = "flux") -> list[Path]:
    """Two files that are one model."""
    names = list(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    return [
        save(folder / f"{stem}-{number:05}-of-00002.safetensors", {name: tensors[name] for name in half})
        for number, half in enumerate(halves, start=1)
    ]


def save_gguf(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    types: Mapping[str, str],
    arch: str | None,
    made: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """A GGUF file; `types` by name, F32 where none is said. Without `arch` as stable-diffusion.cpp writes it.

    `made` are bytes of types that the gguf package cannot make itself.
    """
    writer = _gguf_writer(path, arch)
    for name, (kind, data) in _encoded(tensors, types, made or {}).items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_values(
    tensors: Mapping[str, torch.Tensor], types: Mapping[str, str], made: Mapping[str, np.ndarray] | None = None
) -> dict[str, torch.Tensor]:
    """What a GGUF file of these types stands for, in float32, by the gguf package."""
    return {
        name: torch.from_numpy(np.ascontiguousarray(gguf.dequantize(data, kind))).reshape(tensors[name].shape)
        for name, (kind, data) in _encoded(tensors, types, made or {}).items()
    }


def _encoded(
    tensors: Mapping[str, torch.Tensor], types: Mapping[str, str], made: Mapping[str, np.ndarray]
) -> dict[str, tuple[gguf.GGMLQuantizationType, np.ndarray]]:
    kinds = {name: gguf.GGMLQuantizationType[types.get(name, "F32")] for name in tensors}
    return {
        name: (kind, made[name] if name in made else gguf.quantize(tensors[name].float().numpy(), kind))
        for name, kind in kinds.items()
    }


def _gguf_writer(path: Path, arch: str | None) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, arch or "none")
    if arch is None:
        for keys in writer.kv_data:
            keys.pop("general.architecture", None)
    return writer


# full-size files whose data is a hole ---------------------------------------------------------------------------------


def full_size(inputs: int = 64, guidance: bool = True) -> dict[str, tuple[int, ...]]:
    """Diffusers names and shapes of FLUX.1."""
    width = 3072
    first = {"context_embedder": 4096, "x_embedder": inputs}
    for name, features in (("timestep", 256), ("text", 768), *((("guidance", 256),) if guidance else ())):
        first |= {f"time_text_embed.{name}_embedder.linear_1": features}
    heights = {"norm1": 6, "norm1_context": 6, "norm": 3, "net": 4, "proj_mlp": 4}
    shapes: dict[str, tuple[int, ...]] = {}
    modules = [part for parts in bfl_modules(19, 38, guidance).values() for part in parts]
    for name in (*modules, "norm_out.linear"):
        parts = name.split(".")
        rows, columns = width, first.get(name, width)
        if name == "norm_out.linear":
            rows = 2 * width
        elif name == "proj_out":
            rows = 64
        elif parts[-1] == "linear":
            rows = heights[parts[-2]] * width
        elif parts[-1] == "proj_mlp" or parts[-2:] == ["0", "proj"]:
            rows = 4 * width
        elif parts[-2:] == ["net", "2"]:
            columns = 4 * width
        elif parts[-1] == "proj_out":
            columns = 5 * width
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    return shapes | dict.fromkeys(bfl_norms(19, 38).values(), (128,))


def full_size_bfl(inputs: int = 64, guidance: bool = True) -> dict[str, tuple[int, ...]]:
    """BFL names and shapes of FLUX.1."""
    meta = {name: torch.empty(shape, device="meta") for name, shape in full_size(inputs, guidance).items()}
    return {name: tuple(tensor.shape) for name, tensor in to_bfl(meta).items()}


def save_hole(path: Path, tensors: Entries, contents: Mapping[str, bytes] | None = None) -> Path:
    """A safetensors file of these (dtype, shape) whose data is never written, but for some small tensors."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for name, content in (contents or {}).items():
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(content)
    return path


def save_gguf_hole(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], arch: str | None) -> Path:
    """A GGUF file of these (type, shape) whose data is never written; the header is the gguf package's."""
    writer, total = _gguf_writer(path, arch), 0
    for name, (type_name, shape) in tensors.items():
        kind = gguf.GGMLQuantizationType[type_name]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        size = math.prod(shape) // block * block_bytes
        stored = (*shape[:-1], shape[-1] // block * block_bytes) if block > 1 else shape
        dtype = np.dtype(np.uint8) if block > 1 else np.dtype(np.float32)
        writer.add_tensor_info(name, stored, dtype, size, raw_dtype=kind)
        total = total + -(-size // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    start = -(-writer.fout[0].tell() // 32) * 32
    writer.close()
    with path.open("r+b") as file:
        file.truncate(start + total)
    return path
