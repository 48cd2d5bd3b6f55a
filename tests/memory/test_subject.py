"""Models from files: the same bytes as the files' own readers tell."""

import gguf
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file

from gossamer.errors import AdapterError, FileMissingError, WrongModelError
from gossamer.memory.adapter_cost import adapter_cost
from gossamer.memory.budget import Budget
from gossamer.memory.cards import find_card
from gossamer.memory.model_cost import transformer_bytes
from gossamer.memory.model_specs import CLIP_L, FLUX_DEV, FLUX_VAE, T5_XXL
from gossamer.memory.picture import Job
from gossamer.memory.plan import plan
from gossamer.memory.request import PlanRequest
from gossamer.memory.subject import file_subject
from gossamer.models.flux_spec import FluxSpec, linear_shapes

SMALL = FluxSpec(1, 2, 2, 128, 64, 64, 4096, 768, guidance_embeds=True)


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    model = FluxTransformer2DModel(num_layers=1, num_single_layers=2, num_attention_heads=2, guidance_embeds=True)
    return {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def plain_file(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "small.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def gguf_file(tensors, tmp_path_factory):
    """Linears of the blocks in Q8_0, everything else in 32 bits."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        if "transformer_blocks" in name and values.ndim == 2:
            blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def request(subject, **named) -> PlanRequest:
    return PlanRequest(subject, find_card("RTX 3060"), Budget(6 * 10**9), Job(512, 512), **named)


def test_a_plain_file(plain_file):
    subject = file_subject(plain_file)
    assert subject.spec.transformer == SMALL
    assert (subject.spec.t5, subject.spec.clip, subject.spec.vae) == (T5_XXL, CLIP_L, FLUX_VAE)
    assert subject.fixed is None
    assert subject.is_here
    assert subject.stored == "bf16"
    assert {way.storage for way in plan(request(subject)).plans} > {"bf16", "nf4"}


def test_a_quantised_file_stays_as_it_is(gguf_file):
    subject = file_subject(gguf_file)
    assert subject.fixed is not None
    reader = gguf.GGUFReader(gguf_file)
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors}
    blocks = {name: size for name, size in sizes.items() if "transformer_blocks" in name and name.endswith(".weight")}
    linears = {name: size for name, size in blocks.items() if "norm_" not in name}
    modulation = sum(size for name, size in linears.items() if ".norm" in name)
    assert subject.fixed.modulation == modulation
    assert sum(subject.fixed.blocks) == sum(linears.values()) - modulation
    assert subject.fixed.storages == {"Q8_0": sum(transformer_bytes(SMALL, "bf16").blocks) // 2}
    planning = plan(request(subject))
    assert {way.storage for way in planning.plans} == {"Q8_0"}
    assert planning.chosen.disk_bytes == 0
    packed = plan(request(subject, storage="nf4"))
    assert {way.storage for way in packed.plans} == {"nf4"}
    assert any("a second time" in note for note in packed.notes)
    assert subject.fixed.modulation_storage == "Q8_0"


def test_what_is_no_model(tmp_path, tensors):
    with pytest.raises(FileMissingError):
        file_subject(tmp_path / "nothing.safetensors")
    vae = tmp_path / "vae.safetensors"
    save_file({"decoder.conv_in.weight": torch.zeros(4, 4, 3, 3), "decoder.conv_in.bias": torch.zeros(4)}, vae)
    with pytest.raises(WrongModelError):
        file_subject(vae)
    part = tmp_path / "part.safetensors"
    kept = {name: tensor for name, tensor in tensors.items() if "proj_mlp" not in name}
    save_file(kept, part)
    with pytest.raises(WrongModelError, match="not a whole"):
        file_subject(part)


# adapters -------------------------------------------------------------------------------------------------------------


def lora(rank: int, width: int = FLUX_DEV.width) -> dict[str, torch.Tensor]:
    """PEFT's names, on the queries of a block."""
    name = "transformer.single_transformer_blocks.0.attn.to_q"
    return {f"{name}.lora_A.weight": torch.zeros(rank, width), f"{name}.lora_B.weight": torch.zeros(width, rank)}


def test_an_adapter_costs_its_bytes_twice(tmp_path):
    file = tmp_path / "style.safetensors"
    save_file(lora(8), file)
    cost = adapter_cost(file, FLUX_DEV)
    assert (cost.name, cost.rank) == ("style.safetensors", 8)
    assert cost.nbytes == 2 * 8 * 3072 * 4
    assert cost.gpu_bytes == 2 * cost.nbytes


def test_adapters_that_do_not_belong(tmp_path, plain_file):
    other = tmp_path / "other.safetensors"
    save_file(lora(8, width=256), other)
    with pytest.raises(WrongModelError, match="another size"):
        adapter_cost(other, FLUX_DEV)
    with pytest.raises(AdapterError, match="not an adapter"):
        adapter_cost(plain_file, FLUX_DEV)


def test_linear_shapes_agree_with_the_small_model(tensors):
    for name, shape in linear_shapes(SMALL).items():
        assert tuple(tensors[f"{name}.weight"].shape) == shape
