"""Write golden_comfy_kitchen.json: weights that comfy-kitchen quantised, and what its eager backend decodes them to.

    pip install torch comfy-kitchen && python make_golden.py

Small results are kept whole; of large ones that have to agree to the bit, the SHA-256 of the float32 bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import comfy_kitchen
import torch
from comfy_kitchen.tensor import (
    AsymW4A8Int8Layout,
    TensorCoreAWQW4A16Layout,
    TensorCoreConvRotW4A4Layout,
    TensorCoreFP8Layout,
    TensorCoreMXFP8Layout,
    TensorCoreNVFP4Layout,
    TensorWiseINT8Layout,
)

DTYPES = {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def encode(tensor):
    data = base64.b64encode(zlib.compress(raw(tensor), 9)).decode()
    return {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data": data}


def case(settings, stored, decoded, exact):
    result = {"sha256": hashlib.sha256(raw(decoded)).hexdigest()} if exact else {"decoded": encode(decoded)}
    tensors = {name: encode(tensor) for name, tensor in stored.items() if tensor is not None}
    return {"settings": settings, "tensors": tensors, **result}


def quantised(layout, shape, settings, exact=True, **options):
    weight = torch.randn(shape) * 0.02 * (1 + 5 * torch.rand(shape[0], 1))
    codes, params = layout.quantize(weight, **options)
    stored = {"weight" + suffix: tensor for suffix, tensor in layout.state_dict_tensors(codes, params).items()}
    decoded = layout.dequantize(codes, replace(params, orig_dtype=torch.float32))
    return case(settings, stored, decoded[: shape[0], : shape[1]], exact)


def awq():
    # there is no quantiser: any codes
    codes = torch.randint(-128, 128, (24, 64), dtype=torch.int8)
    scale, zeros = torch.rand(2, 24).bfloat16(), torch.randn(2, 24).bfloat16()
    params = TensorCoreAWQW4A16Layout.Params(
        scale=scale.float(), zeros=zeros.float(), group_size=64, orig_dtype=torch.float32, orig_shape=(24, 128)
    )
    stored = {"weight": codes, "weight_scale": scale, "weight_zeros": zeros}
    return case({"format": "awq_w4a16"}, stored, TensorCoreAWQW4A16Layout.dequantize(codes, params), True)


def cases():
    int8, rotation = {"format": "int8_tensorwise"}, {"convrot": True, "convrot_groupsize": 64}
    w4a8 = {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 64}
    sizes = {"group_size": 16, "convrot_groupsize": 64}
    padded = {"format": "nvfp4", "orig_shape": [35, 24], "group_size": 16}
    rotated = {"per_channel": True, **rotation}
    return {
        "nvfp4": quantised(TensorCoreNVFP4Layout, (144, 80), {"format": "nvfp4"}),
        "nvfp4 padded": quantised(TensorCoreNVFP4Layout, (35, 24), padded),
        "mxfp8": quantised(TensorCoreMXFP8Layout, (160, 160), {"format": "mxfp8"}),
        "fp8": quantised(TensorCoreFP8Layout, (24, 32), {"format": "float8_e4m3fn"}),
        "int8 by tensor": quantised(TensorWiseINT8Layout, (24, 32), int8),
        "int8 by row": quantised(TensorWiseINT8Layout, (24, 32), {**int8, "per_row": True}, per_channel=True),
        "int8 rotated": quantised(TensorWiseINT8Layout, (8, 128), {**int8, **rotation}, exact=False, **rotated),
        "int8 rotated by 256": quantised(
            TensorWiseINT8Layout,
            (3, 512),
            {**int8, "params": {"convrot": True}},
            exact=False,
            per_channel=True,
            convrot=True,
        ),
        "convrot_w4a4": quantised(
            TensorCoreConvRotW4A4Layout,
            (8, 128),
            {"format": "convrot_w4a4", "convrot_groupsize": 16, "linear_dtype": "int8"},
            exact=False,
            convrot_groupsize=16,
        ),
        "w4a8": quantised(AsymW4A8Int8Layout, (8, 128), w4a8, exact=False, **sizes),
        "w4a8 without codebook": quantised(AsymW4A8Int8Layout, (8, 128), w4a8, exact=False, codebook=False, **sizes),
        "w4a8 asymmetric": quantised(AsymW4A8Int8Layout, (8, 128), w4a8, exact=False, symmetric=False, **sizes),
        "awq": awq(),
    }


def main():
    torch.manual_seed(0)
    with comfy_kitchen.use_backend("eager"):
        made = cases()
    source = f"comfy-kitchen {version('comfy-kitchen')} (Apache-2.0), eager backend, torch {torch.__version__}"
    path = Path(__file__).with_name("golden_comfy_kitchen.json")
    path.write_text(json.dumps({"made by": source, "cases": made}, indent=1) + "\n")


if __name__ == "__main__":
    main()
