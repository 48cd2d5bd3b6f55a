"""Keys of adapter files as trainers write them, typed from shared/file-formats.md and not from the parser's tables.

A naming gives (out, in) by module; a spelling adds prefix and endings. Where a fused module's rows go is here too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Size:
    double: int
    single: int
    width: int
    channels: int
    text: int
    pooled: int


FULL = Size(19, 38, 3072, 64, 4096, 768)
TINY = Size(1, 1, 256, 64, 256, 256)


def ends_bfl(size):
    w = size.width
    return {
        "img_in": (w, size.channels),
        "txt_in": (w, size.text),
        "time_in.in_layer": (w, 256),
        "time_in.out_layer": (w, w),
        "vector_in.in_layer": (w, size.pooled),
        "vector_in.out_layer": (w, w),
        "guidance_in.in_layer": (w, 256),
        "guidance_in.out_layer": (w, w),
        "final_layer.linear": (size.channels, w),
        "final_layer.adaLN_modulation.1": (2 * w, w),
    }


def blocks_bfl(size):
    w, found = size.width, {}
    for i in range(size.double):
        for stream in ("img", "txt"):
            found[f"double_blocks.{i}.{stream}_attn.qkv"] = (3 * w, w)
            found[f"double_blocks.{i}.{stream}_attn.proj"] = (w, w)
            found[f"double_blocks.{i}.{stream}_mlp.0"] = (4 * w, w)
            found[f"double_blocks.{i}.{stream}_mlp.2"] = (w, 4 * w)
            found[f"double_blocks.{i}.{stream}_mod.lin"] = (6 * w, w)
    for i in range(size.single):
        found[f"single_blocks.{i}.linear1"] = (7 * w, w)
        found[f"single_blocks.{i}.linear2"] = (w, 5 * w)
        found[f"single_blocks.{i}.modulation.lin"] = (3 * w, w)
    return found


def bfl(size):
    return {**ends_bfl(size), **blocks_bfl(size)}


def onetrainer_bfl(size):
    """Fused modules split and numbered, and another name for the input layer."""
    w, found = size.width, {}
    for name, shape in bfl(size).items():
        if name.endswith("qkv"):
            found |= {f"{name}.{part}": (w, w) for part in range(3)}
        elif name.endswith("linear1"):
            found |= {f"{name}.{part}": (w, w) for part in range(3)} | {f"{name}.3": (4 * w, w)}
        else:
            found["img_in.proj" if name == "img_in" else name] = shape
    return found


def xlabs(size):
    w, found = size.width, {}
    for i in range(size.double):
        for stream in (1, 2):
            found[f"double_blocks.{i}.processor.qkv_lora{stream}"] = (3 * w, w)
            found[f"double_blocks.{i}.processor.proj_lora{stream}"] = (w, w)
    for i in range(size.single):
        found[f"single_blocks.{i}.processor.qkv_lora"] = (3 * w, w)
        found[f"single_blocks.{i}.processor.proj_lora"] = (w, 5 * w)
    return found


def diffusers(size):
    w = size.width
    found = {
        "x_embedder": (w, size.channels),
        "context_embedder": (w, size.text),
        "norm_out.linear": (2 * w, w),
        "proj_out": (size.channels, w),
    }
    for embedder, inputs in (("timestep", 256), ("guidance", 256), ("text", size.pooled)):
        found[f"time_text_embed.{embedder}_embedder.linear_1"] = (w, inputs)
        found[f"time_text_embed.{embedder}_embedder.linear_2"] = (w, w)
    for i in range(size.double):
        block = f"transformer_blocks.{i}"
        for part in ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]:
            found[f"{block}.attn.{part}"] = (w, w)
        for stream in ("", "_context"):
            found[f"{block}.norm1{stream}.linear"] = (6 * w, w)
            found[f"{block}.ff{stream}.net.0.proj"] = (4 * w, w)
            found[f"{block}.ff{stream}.net.2"] = (w, 4 * w)
    for i in range(size.single):
        block = f"single_transformer_blocks.{i}"
        found |= {f"{block}.attn.to_{part}": (w, w) for part in "qkv"}
        found |= {f"{block}.norm.linear": (3 * w, w), f"{block}.proj_mlp": (4 * w, w), f"{block}.proj_out": (w, 5 * w)}
    return found


def clip(layers=12, width=768):
    found = {}
    for i in range(layers):
        layer = f"text_model.encoder.layers.{i}"
        found |= {f"{layer}.self_attn.{part}_proj": (width, width) for part in ("q", "k", "v", "out")}
        found |= {f"{layer}.mlp.fc1": (4 * width, width), f"{layer}.mlp.fc2": (width, 4 * width)}
    return found


def t5(layers=24, width=4096, inner=4096, mlp=10240):
    found = {}
    for i in range(layers):
        block = f"encoder.block.{i}.layer"
        found |= {f"{block}.0.SelfAttention.{part}": (inner, width) for part in "qkv"}
        found |= {f"{block}.0.SelfAttention.o": (width, inner), f"{block}.1.DenseReluDense.wo": (width, mlp)}
        found |= {f"{block}.1.DenseReluDense.wi_{part}": (mlp, width) for part in (0, 1)}
    return found


def underscored(modules):
    return {name.replace(".", "_"): shape for name, shape in modules.items()}


def prefixed(prefix, modules):
    return {prefix + name: shape for name, shape in modules.items()}


@dataclass(frozen=True)
class Wild:
    """One way to write: the naming of the transformer, its prefix, the endings of down and up, whether alpha is there.

    `texts` are prefixes of CLIP and T5, `underscores` whether dots become underscores.
    """

    naming: object
    prefix: str
    down: str
    up: str
    alpha: bool = False
    underscores: bool = False
    texts: tuple[str, str] | None = None

    def _named(self, prefix, modules):
        return prefixed(prefix, underscored(modules) if self.underscores else modules)

    def transformer(self, size):
        """(out, in) by module, prefix and all, with the naming's own name."""
        names = self.naming(size)
        return {
            full: (own, shape)
            for (full, shape), own in zip(self._named(self.prefix, names).items(), names, strict=True)
        }

    def text(self):
        if self.texts is None:
            return {}
        return {**self._named(self.texts[0], clip()), **self._named(self.texts[1], t5())}

    def keys(self, modules):
        endings = (self.down, self.up, *([".alpha"] if self.alpha else []))
        return [name + ending for name in modules for ending in endings]

    def file(self, modules, rank=1, dtype=torch.float32, generator=None, alpha=None):
        """Random tensors by key for (out, in) by module."""
        tensors = {}
        for name, (out_features, in_features) in modules.items():
            factors = {self.down: (rank, in_features), self.up: (out_features, rank)}
            for ending, shape in factors.items():
                values = torch.ones(shape) if generator is None else torch.randn(shape, generator=generator) * 0.1
                tensors[name + ending] = values.to(dtype)
            if self.alpha:
                tensors[name + ".alpha"] = torch.tensor(float(rank if alpha is None else alpha))
        return tensors


KOHYA = (".lora_down.weight", ".lora_up.weight")
PEFT = (".lora_A.weight", ".lora_B.weight")
NAMED = (".lora_A.default.weight", ".lora_B.default.weight")

SPELLINGS = {
    "kohya, blocks": Wild(blocks_bfl, "lora_unet_", *KOHYA, alpha=True, underscores=True),
    "kohya, embedders and final layer": Wild(bfl, "lora_unet_", *KOHYA, alpha=True, underscores=True),
    "kohya, text encoders": Wild(bfl, "lora_unet_", *KOHYA, True, True, ("lora_te1_", "lora_te3_")),
    "OneTrainer, diffusers names": Wild(diffusers, "lora_transformer_", *KOHYA, True, True, ("lora_te1_", "lora_te2_")),
    "OneTrainer, BFL names": Wild(onetrainer_bfl, "transformer.", *KOHYA, True, False, ("clip_l.", "t5.")),
    "diffusers": Wild(diffusers, "transformer.", *PEFT, texts=("text_encoder.", "text_encoder_2.")),
    "diffusers, kohya's endings": Wild(diffusers, "transformer.", *KOHYA, alpha=True),
    "diffusers, before PEFT": Wild(diffusers, "transformer.", ".lora.down.weight", ".lora.up.weight", alpha=True),
    "diffusers, older": Wild(diffusers, "transformer.", "_lora.down.weight", "_lora.up.weight"),
    "diffusers, transformers' layer": Wild(
        diffusers, "transformer.", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"
    ),
    "diffusers, bare parameters": Wild(diffusers, "transformer.", ".lora_A", ".lora_B"),
    "PEFT, base_model.model": Wild(diffusers, "base_model.model.", *PEFT),
    "PEFT, base_model.model.transformer": Wild(diffusers, "base_model.model.transformer.", *PEFT),
    "PEFT, transformer.base_model.model": Wild(diffusers, "transformer.base_model.model.", *PEFT),
    "PEFT, default": Wild(diffusers, "base_model.model.", *NAMED),
    "PEFT, no prefix": Wild(diffusers, "", *PEFT),
    "ai-toolkit, diffusion_model": Wild(bfl, "diffusion_model.", *PEFT),
    "ai-toolkit, bare": Wild(bfl, "", *PEFT),
    "fal Kontext": Wild(bfl, "base_model.model.", *PEFT),
    "XLabs": Wild(xlabs, "", ".down.weight", ".up.weight"),
    "USO": Wild(xlabs, "diffusion_model.", ".down.weight", ".up.weight"),
    "ComfyUI": Wild(
        bfl,
        "diffusion_model.",
        *KOHYA,
        texts=("text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer."),
    ),
    "LyCORIS, plain": Wild(diffusers, "lycoris_", *KOHYA, alpha=True, underscores=True),
}

_PLAIN = {
    "img_in": "x_embedder",
    "img_in.proj": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_DOUBLE = {
    "mod.lin": ("norm1.linear", "norm1_context.linear"),
    "attn.proj": ("attn.to_out.0", "attn.to_add_out"),
    "mlp.0": ("ff.net.0.proj", "ff_context.net.0.proj"),
    "mlp.2": ("ff.net.2", "ff_context.net.2"),
}
_QKV = (("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"))


def placed(module, change):
    """A dense change (rows, ...) of a file's module, as changes of diffusers linears."""
    if module in _PLAIN:
        return {_PLAIN[module]: change}
    if module == "final_layer.adaLN_modulation.1":
        shift, scale = change.chunk(2)
        return {"norm_out.linear": torch.cat([scale, shift])}
    kind, _, rest = module.partition(".")
    number, _, part = rest.partition(".")
    if kind == "double_blocks":
        return {f"transformer_blocks.{number}.{name}": value for name, value in _in_double(part, change).items()}
    if kind == "single_blocks":
        return {f"single_transformer_blocks.{number}.{name}": value for name, value in _in_single(part, change).items()}
    return {module: change}  # a diffusers name


def _in_double(part, change):
    if part.startswith("processor."):
        part = {"1": "img_attn.", "2": "txt_attn."}[part[-1]] + ("qkv" if "qkv" in part else "proj")
    stream, part = ("img", "txt").index(part[:3]), part[4:]
    if part == "attn.qkv":
        return dict(zip(_QKV[stream], change.chunk(3), strict=True))
    if part.startswith("attn.qkv."):
        return {_QKV[stream][int(part[-1])]: change}
    return {_DOUBLE[part][stream]: change}


def _in_single(part, change):
    parts = (*_QKV[0], "proj_mlp")
    if part == "linear1":
        w = change.shape[0] // 7
        return dict(zip(parts, change.split([w, w, w, 4 * w]), strict=True))
    if part == "processor.qkv_lora":
        return dict(zip(_QKV[0], change.chunk(3), strict=True))
    if part.startswith("linear1."):
        return {parts[int(part[-1])]: change}
    return {{"linear2": "proj_out", "processor.proj_lora": "proj_out", "modulation.lin": "norm.linear"}[part]: change}
