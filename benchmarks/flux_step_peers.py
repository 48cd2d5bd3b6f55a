"""The peers of `flux_step`: diffusers' transformer, quantised by diffusers' own quantisers as its loaders would do it.

Weights are made on the device and handed to the quantiser one by one, as `from_pretrained` and `from_single_file` do.
Every peer quantises the linears inside the blocks and keeps the rest in bf16, as Gossamer does.
Adapters go through `load_lora_adapter`, that is PEFT.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from gossamer.adapters import Adapter
from gossamer.bench.random_flux import Workload, block_linears, fill, put, random_tensor, weight_shapes
from gossamer.formats import pack, packed_bytes


def plain(work: Workload) -> Any:
    """diffusers' transformer in bf16."""
    model = _skeleton(work)
    fill(model, work)
    return model.eval()


def torchao_fp8(work: Workload) -> Any:
    """fp8 weights with a scale per row, activations quantised row by row."""
    from diffusers import TorchAoConfig
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    return _quantised(work, TorchAoConfig(Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())))


def bitsandbytes_int8(work: Workload) -> Any:
    """LLM.int8 with the outlier threshold that diffusers sets."""
    from diffusers import BitsAndBytesConfig

    return _quantised(work, BitsAndBytesConfig(load_in_8bit=True))


def bitsandbytes_nf4(work: Workload) -> Any:
    """NF4 in blocks of 64, products in bf16."""
    from diffusers import BitsAndBytesConfig

    four_bit = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    return _quantised(work, BitsAndBytesConfig(load_in_4bit=True, **four_bit))


def quanto(work: Workload, weights_dtype: str) -> Any:
    """optimum-quanto's weight-only "int8" or "float8"."""
    from diffusers import QuantoConfig

    return _quantised(work, QuantoConfig(weights_dtype=weights_dtype))


def gguf(work: Workload, storage: str) -> Any:
    """GGUF blocks, decoded by diffusers at every call; products in bf16. The bytes come from Gossamer's packer."""
    from diffusers import GGUFQuantizationConfig
    from diffusers.quantizers.gguf.utils import GGUFParameter
    from gguf import GGMLQuantizationType

    kind = GGMLQuantizationType[storage]

    def packed(weight: torch.Tensor) -> Any:
        return GGUFParameter(pack(weight, storage).tensors["blocks"], quant_type=kind)

    def described(shape: tuple[int, int]) -> Any:
        empty = torch.empty(shape[0], packed_bytes(storage, *shape) // shape[0], dtype=torch.uint8, device="meta")
        return GGUFParameter(empty, quant_type=kind)

    state_dict = {f"{name}.weight": described(shape) for name, shape in block_linears(work.spec).items()}
    return _quantised(work, GGUFQuantizationConfig(compute_dtype=torch.bfloat16), packed, state_dict)


# adapters -------------------------------------------------------------------------------------------------------------


def attach(model: Any, adapters: Sequence[Adapter]) -> None:
    """Load adapters as a user would; all of them act at once."""
    names = [f"adapter_{place}" for place in range(len(adapters))]
    for name, adapter in zip(names, adapters, strict=True):
        downs = {f"{layer}.lora_A.weight": term.down for layer, term in adapter.terms.items()}
        ups = {f"{layer}.lora_B.weight": term.up for layer, term in adapter.terms.items()}
        model.load_lora_adapter({**downs, **ups}, adapter_name=name, prefix=None)
    if names:
        model.set_adapters(names)


def detach(model: Any) -> None:
    """Take all adapters off and put the layers that PEFT wrapped back."""
    if getattr(model, "peft_config", None):
        model.unload_lora()


# loading --------------------------------------------------------------------------------------------------------------


def _skeleton(work: Workload) -> Any:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(work.config)
    return nn.Module.to(model, torch.bfloat16)  # the model's own `to` warns of types that FLUX does not ask for


def _same(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _quantised(
    work: Workload,
    config: Any,
    as_in_file: Callable[[torch.Tensor], Any] = _same,
    state_dict: dict[str, Any] | None = None,
) -> Any:
    """The transformer through a diffusers quantiser; `as_in_file` makes of a weight what the checkpoint would hold."""
    from diffusers.quantizers.auto import DiffusersAutoQuantizer

    quantizer = DiffusersAutoQuantizer.from_config(config, pre_quantized=state_dict is not None)
    model, state_dict = _skeleton(work), state_dict or {}
    inside = {f"{name}.weight" for name in block_linears(work.spec)}
    outside = {name: child for name, child in model.named_modules() if _is_plain_linear(name, child, inside)}
    quantizer.preprocess_model(model=model, device_map=None, keep_in_fp32_modules=[], state_dict=state_dict)
    for name, linear in outside.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    for name, shape in weight_shapes(work.spec).items():
        value = random_tensor(name, shape, work)
        if name not in inside:
            put(model, name, value)
            continue
        value = as_in_file(value)
        if not quantizer.check_if_quantized_param(model, value, name, state_dict):
            raise RuntimeError(f"{type(quantizer).__name__} leaves {name} as it is, so it would not be measured")
        quantizer.create_quantized_param(
            model, value, name, work.device, state_dict=state_dict, unexpected_keys=[], dtype=torch.bfloat16
        )
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer
    _move_buffers(model, work.device)
    return model.eval()


def _is_plain_linear(name: str, child: nn.Module, inside: set[str]) -> bool:
    return isinstance(child, nn.Linear) and f"{name}.weight" not in inside


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    """Scales that a replaced layer registers are made on the CPU; `model.to` would repack what is already packed."""
    for child in model.modules():
        for name, buffer in child.named_buffers(recurse=False):
            child._buffers[name] = buffer.to(device)
