"""`gossamer inspect` on files of full size whose data is a hole on the disk, with names made without the parser."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest

from gossamer.cli.main import main
from gossamer.demo.embedded import adapter_paths, model_folder
from gossamer.pipeline.inspect import inspect

W = 3072
BYTES = {"BF16": 2, "F8_E4M3": 1, "F32": 4, "U8": 1, "F16": 2}


def write(path, tensors, metadata=None):
    """A safetensors file of these (dtype, shape); its data is never written."""
    header, end = ({"__metadata__": metadata} if metadata else {}), 0
    for name, (dtype, shape) in tensors.items():
        size = BYTES[dtype]
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def linear(name, out, inputs, dtype="BF16"):
    return {f"{name}.weight": (dtype, (out, inputs)), f"{name}.bias": (dtype, (out,))}


def bfl(inputs=64, guidance=True, dtype="BF16"):
    """The 780 tensors of FLUX.1-dev's own file."""
    tensors = {**linear("img_in", W, inputs, dtype), **linear("txt_in", W, 4096, dtype)}
    embedders = {"time_in": 256, "vector_in": 768} | ({"guidance_in": 256} if guidance else {})
    for name, first in embedders.items():
        tensors |= {**linear(f"{name}.in_layer", W, first, dtype), **linear(f"{name}.out_layer", W, W, dtype)}
    for i in range(19):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            tensors |= linear(f"{block}_mod.lin", 6 * W, W, dtype)
            tensors |= {**linear(f"{block}_attn.qkv", 3 * W, W, dtype), **linear(f"{block}_attn.proj", W, W, dtype)}
            tensors |= {**linear(f"{block}_mlp.0", 4 * W, W, dtype), **linear(f"{block}_mlp.2", W, 4 * W, dtype)}
            for norm in ("query", "key"):
                tensors[f"{block}_attn.norm.{norm}_norm.scale"] = (dtype, (128,))
    for i in range(38):
        block = f"single_blocks.{i}"
        tensors |= {**linear(f"{block}.linear1", 7 * W, W, dtype), **linear(f"{block}.linear2", W, 5 * W, dtype)}
        tensors |= linear(f"{block}.modulation.lin", 3 * W, W, dtype)
        for norm in ("query", "key"):
            tensors[f"{block}.norm.{norm}_norm.scale"] = (dtype, (128,))
    last = {**linear("final_layer.linear", 64, W, dtype), **linear("final_layer.adaLN_modulation.1", 2 * W, W, dtype)}
    return tensors | last


@pytest.mark.parametrize(
    ("inputs", "guidance", "model"),
    [
        (64, True, "FLUX.1-dev"),
        (64, False, "FLUX.1-schnell"),
        (384, True, "FLUX.1-Fill-dev"),
        (128, True, "FLUX.1-Canny-dev or -Depth-dev"),
    ],
)
def test_models_of_black_forest_labs(tmp_path, inputs, guidance, model):
    found = inspect(write(tmp_path / "flux.safetensors", bfl(inputs, guidance)))
    assert (found.kind, found.layout, found.model) == ("checkpoint", "bfl", model)
    assert found.unused == ()
    assert found.total == found.used == (780 if guidance else 776)
    if model == "FLUX.1-dev":
        assert found.parameters == 11_901_408_320  # as the model card counts them: 12 billion


def test_an_all_in_one_file(tmp_path):
    tensors = {f"model.diffusion_model.{name}": entry for name, entry in bfl(dtype="F8_E4M3").items()}
    tensors["text_encoders.clip_l.transformer.text_model.final_layer_norm.weight"] = ("F16", (768,))
    tensors["text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight"] = (
        "F8_E4M3",
        (4096, 4096),
    )
    tensors["vae.decoder.conv_in.weight"] = ("F32", (512, 16, 3, 3))
    found = inspect(write(tmp_path / "all.safetensors", tensors))
    assert (found.layout, found.model, found.unused) == ("all-in-one", "FLUX.1-dev", ())
    assert found.storage["F8_E4M3"] == 781
    assert found.modules["text_encoder_2"] == 1


def test_scaled_fp8(tmp_path):
    tensors = bfl(dtype="F8_E4M3")
    weights = [name for name in tensors if name.endswith(".weight")]
    for name in weights:
        tensors[name.removesuffix("weight") + "scale_weight"] = ("F32", ())
        tensors[name.removesuffix("weight") + "scale_input"] = ("F32", ())
    tensors["scaled_fp8"] = ("F8_E4M3", (0,))
    found = inspect(write(tmp_path / "scaled.safetensors", tensors))
    assert (found.unused, found.notes) == ((), ("scaled fp8",))
    assert found.parameters == 11_901_408_320


@pytest.mark.parametrize("nested", [True, False], ids=["v1", "v2"])
def test_nf4_of_forge(tmp_path, nested):
    tensors = {}
    for name, (dtype, shape) in bfl().items():
        if not name.endswith(".weight"):
            tensors[f"model.diffusion_model.{name}"] = (dtype, shape)
            continue
        values = shape[0] * shape[1]
        stored = {"": ("U8", (values // 2, 1)), ".absmax": ("F32", (values // 64,)), ".quant_map": ("F32", (16,))}
        if nested:
            stored |= {".absmax": ("U8", (values // 64,)), ".nested_absmax": ("F32", (values // 64 // 256 + 1,))}
            stored[".nested_quant_map"] = ("F32", (256,))
        stored[".quant_state.bitsandbytes__nf4"] = ("U8", (80,))
        tensors |= {f"model.diffusion_model.{name}{ending}": entry for ending, entry in stored.items()}
    found = inspect(write(tmp_path / "nf4.safetensors", tensors))
    assert (found.unused, found.notes, found.model) == ((), ("bitsandbytes 4-bit",), "FLUX.1-dev")
    assert found.parameters == 11_901_408_320


def test_a_gguf_file(tmp_path):
    """Written by the `gguf` package: BFL names, an architecture key, three types."""
    writer = gguf.GGUFWriter(tmp_path / "flux.gguf", "flux")
    values = np.zeros((64, 256), dtype=np.float32)
    for i in range(2):
        for name, kind in (("img_attn.qkv", "Q8_0"), ("img_mlp.0", "Q4_0")):
            packed = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
            writer.add_tensor(f"double_blocks.{i}.{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType[kind])
    for i in range(4):
        writer.add_tensor(f"single_blocks.{i}.norm.key_norm.scale", np.zeros(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = inspect(tmp_path / "flux.gguf")
    assert (found.layout, found.model, found.unused) == ("bfl", "the embedded model", ())
    assert found.storage == {"Q8_0": 2, "Q4_0": 2, "F32": 4}
    assert found.parameters == 4 * values.size + 4 * 32


def test_an_unknown_tensor_is_named(tmp_path):
    tensors = {**bfl(), "double_blocks.0.img_attn.extra.weight": ("F32", (3,)), "something": ("F32", (2,))}
    found = inspect(write(tmp_path / "odd.safetensors", tensors))
    assert set(found.unused) == {"double_blocks.0.img_attn.extra.weight", "something"}
    assert found.used == 780


@pytest.mark.parametrize(
    ("name", "layout", "ranks"), [("pencil", "diffusers", (8,)), ("neon", "kohya", None), ("edges", "bfl", None)]
)
def test_the_bundled_adapters(name, layout, ranks, capsys):
    path = adapter_paths()[name]
    assert main(["inspect", str(path), "--format", "json", "--hash"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["kind"], answer["layout"]) == ("adapter", layout)
    assert answer["keys"]["used"] == answer["keys"]["total"]
    assert answer["keys"]["unused"] == []
    assert len(answer["sha256"]) == 64
    assert answer["modules"]["transformer"] > 0
    if ranks:
        assert tuple(answer["ranks"]) == ranks


def test_a_shard_of_the_embedded_model_for_people(capsys):
    path = model_folder() / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors"
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "checkpoint" in shown
    assert "layout:       diffusers" in shown


def test_a_file_that_is_none(tmp_path, capsys):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"\x10\x00")
    assert main(["inspect", str(path)]) == 2
    assert "not a sound safetensors file" in capsys.readouterr().err
