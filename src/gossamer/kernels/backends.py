"""Which backend decodes, multiplies and attends: options in order, each with what forbids it on a given machine.

The facts, with the place in PyTorch's repository or among its issues that states them:
- fp8 `_scaled_mm`, aten/src/ATen/native/cuda/ScaledBlas.cpp: capability 8.9 or at least 9.0. Row scales go to cuBLAS on
  9.x from cuBLAS 12.9 on, and to CUTLASS kernels everywhere else; these are compiled for 8.9, 9.x, 10.x, 11.x and 12.x
  (RowwiseScaledMM.cu; 12.x since torch 2.9, pull requests 155991 and 161236) and are left out of Windows builds.
- On 8.9 before torch 2.12 that CUTLASS kernel ignores the current stream (issue 177651). On 12.0 with torch 2.10 row
  scales were reported to fail on Linux (issue 192707), and to work with torch 2.11.
- attention, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp: flash from 8.0 on; cuDNN heads up to 128, on 9.0 up
  to 256 from cuDNN 9.10 on; torch itself prefers cuDNN on 9.0, 9.3, 10.0 and 10.3 alone, and only above cuDNN 9.15.0,
  because older ones fail where the length is no multiple of 128 (issue 169849).
"""

from __future__ import annotations

from gossamer.kernels.capability import Capability
from gossamer.kernels.decode_support import why_not_decodable
from gossamer.kernels.options import Option, Picked, pick
from gossamer.kernels.wishes import require_attention_wish

OLDEST_TRITON = (7, 5)  # the oldest chip that the kernels are compiled for
FIRST_GLUON, OTHER_GLUON = (3, 6), (3, 9)  # Triton 3.9 has taken away calls of its Gluon that the kernel needs
CUDNN_WITHOUT_LENGTH_DEFECT = 91501
EIGHT_BIT_HEAD = 128
EIGHT_BIT_MERIT = (
    "371 us with the norm and rotation of q and k, against 449 of cuDNN and 35 for those two, measured on one H200 at "
    "24 heads of 128, 4608 tokens; queries and keys in int8, probabilities and values in fp8"
)


# decoding -------------------------------------------------------------------------------------------------------------


def decode_backend(capability: Capability, storage: str, compute: str, in_features: int) -> Picked:
    """What turns the stored bytes into the operand of the product while no adapter is attached."""
    as_stored = Option(
        "none",
        "the stored bytes are the operand already",
        None if storage == compute else f"{storage} bytes are no {compute} operand",
    )
    return pick("decode", (as_stored, *_writers(capability, storage, in_features)))


def merge_backend(capability: Capability, storage: str, in_features: int) -> Picked:
    """What writes base and low-rank terms into the operand while adapters are attached."""
    return pick("merge", _writers(capability, storage, in_features))


def _writers(capability: Capability, storage: str, in_features: int) -> tuple[Option, Option]:
    no_triton = _no_triton(capability) or why_not_decodable(storage, in_features)
    return (
        Option("triton", "one pass over the codes, low-rank terms in the same tile", no_triton),
        Option("torch", "the reference decodes every format on every device", _no_torch(capability, storage)),
    )


def _no_triton(capability: Capability) -> str | None:
    if capability.kind != "cuda" or capability.compute_capability is None:
        return f"the kernels are compiled and tested for NVIDIA only, and this is {capability.chip}"
    if capability.triton is None:
        return capability.triton_obstacle or "Triton is missing"
    if capability.compute_capability < OLDEST_TRITON:
        return f"the kernels are compiled for capability 7.5 and later, and this is {capability.chip}"
    return None


def _no_torch(capability: Capability, storage: str) -> str | None:
    if capability.kind == "mps" and storage.startswith("fp8"):
        return "torch has no eight-bit float tensors on Apple GPUs, so the bytes cannot be there at all"
    return None


# products -------------------------------------------------------------------------------------------------------------


def product_backend(capability: Capability, compute: str) -> Picked:
    """Which function of `products` multiplies."""
    if compute == "fp8":
        return pick("product", _fp8_products(capability))
    if compute == "int8":
        return pick("product", (Option("int_mm", "the int8 product of torch, scaled by rows and columns afterwards"),))
    return pick("product", (Option("linear", f"the {compute} product of the vendor's library, through torch"),))


def _fp8_products(capability: Capability) -> tuple[Option, ...]:
    no_units = None if capability.generation.fp8 else f"{capability.chip} has no fp8 units"
    row_scales = "the library applies both scales before it rounds"
    return (
        Option("scaled_mm_rowwise", row_scales, no_units or _no_row_scales(capability)),
        Option("scaled_mm_tensorwise", "the fp8 product without scales, which are applied afterwards", no_units),
        Option("reference", "eight-bit values multiplied in float32: right, and no faster than float32"),
    )


def _no_row_scales(capability: Capability) -> str | None:
    """Why `_scaled_mm` with row scales cannot be used, on a chip that has fp8 units."""
    major = (capability.compute_capability or (0, 0))[0]
    if major == 9 and (capability.cuda_version or (0, 0)) >= (12, 9):
        return None
    if capability.system == "Windows":
        return f"torch's builds for Windows leave out the row-scaled kernel that {capability.chip} needs"
    if major == 8 and capability.torch_version < (2, 12):
        return "before torch 2.12 the row-scaled kernel for Ada ignores the current stream"
    if major == 12 and capability.torch_version < (2, 11):
        return "before torch 2.11 row scales were reported to fail on this chip"
    return None


# attention ------------------------------------------------------------------------------------------------------------


def attention_backend(
    capability: Capability, activations: str, head_dim: int, *, compute: str, wish: str = "auto"
) -> Picked:
    """Which backend of `attention` serves, for q, k, v of the type `activations` ("bf16", "fp16", "fp32").

    `compute` is the type of the products around it. "auto" rounds the operands of attention to eight bits where these
    products round theirs to eight bits too, and that was measured to be faster; "exact" never does.
    """
    no_eight_bit = _no_eight_bit(capability, activations, head_dim, compute, require_attention_wish(wish))
    options = (
        Option("eight_bit", EIGHT_BIT_MERIT, no_eight_bit),
        Option("cudnn", _cudnn_merit(capability), _no_cudnn(capability, activations, head_dim)),
        Option("flash", "never writes the scores to memory", _no_flash(capability, activations, head_dim)),
        Option("efficient", "never writes the scores to memory", _no_efficient(capability, activations, head_dim)),
        Option("math", "plain torch operations, on every device"),
    )
    return pick("attention", options)


def _no_eight_bit(capability: Capability, activations: str, head_dim: int, compute: str, wish: str) -> str | None:
    if capability.kind != "cuda" or capability.compute_capability != (9, 0):
        return f"it is written for the tensor cores of Hopper (9.0), and this is {capability.chip}"
    if wish == "exact":
        return "it rounds its operands to eight bits, and exact attention was asked for"
    if compute != "fp8":
        return f"it rounds its operands to eight bits, and the products around it run in {compute}"
    if activations != "bf16":
        return f"it takes bf16, not {activations}"
    if head_dim != EIGHT_BIT_HEAD:
        return f"it takes heads of {EIGHT_BIT_HEAD}, not {head_dim}"
    return _no_triton(capability) or _no_gluon(capability)


def _no_gluon(capability: Capability) -> str | None:
    """Why the kernel's language is missing, where Triton is there."""
    numbers = (capability.triton or "").split(".")[:2]
    found = tuple(int(number) if number.isdigit() else 0 for number in numbers)
    if FIRST_GLUON <= found < OTHER_GLUON:
        return None
    first, other = (".".join(map(str, version)) for version in (FIRST_GLUON, OTHER_GLUON))
    return f"it is written in the Gluon of Triton from {first} on and before {other}, and this is {capability.triton}"


def _cudnn_merit(capability: Capability) -> str:
    if capability.generation.name == "Hopper":
        return "631 TFLOP/s against 310 of flash, measured on one H200 at 24 heads of 128, 4608 tokens"
    return "torch itself prefers it on this chip; not measured here"


def _no_cudnn(capability: Capability, activations: str, head_dim: int) -> str | None:
    if capability.kind != "cuda" or capability.compute_capability is None:
        return "it exists for NVIDIA GPUs only"
    if capability.compute_capability[0] not in (9, 10) or capability.compute_capability[1] not in (0, 3):
        return f"neither measured nor preferred by torch on {capability.chip}"
    if capability.cudnn_version is None or capability.cudnn_version < CUDNN_WITHOUT_LENGTH_DEFECT:
        return "before cuDNN 9.15.1 it fails where the number of tokens is no multiple of 128"
    longest = 256 if capability.compute_capability == (9, 0) else 128
    return _half_precision_only(activations) or _bad_head(head_dim, longest, multiple=8)


def _no_flash(capability: Capability, activations: str, head_dim: int) -> str | None:
    if capability.kind == "cpu":
        return None
    if capability.kind == "mps":
        return "it does not exist on Apple GPUs"
    if capability.compute_capability is not None and capability.compute_capability < (8, 0):
        return f"it needs capability 8.0, and this is {capability.chip}"
    if not capability.flash:
        return "this build of torch has none"
    return _half_precision_only(activations) or _bad_head(head_dim, 256, multiple=1)


def _no_efficient(capability: Capability, activations: str, head_dim: int) -> str | None:
    if capability.kind not in ("cuda", "rocm"):
        return "it exists for NVIDIA and AMD GPUs only"
    if capability.kind == "rocm" and not capability.flash:
        return "this build of torch has none"  # on AMD one library, AOTriton, brings both
    if activations == "bf16" and not capability.generation.bf16:
        return f"{capability.chip} has no bf16 units"
    return _bad_head(head_dim, None, multiple=4 if activations == "fp32" else 8)


def _half_precision_only(activations: str) -> str | None:
    return None if activations in ("bf16", "fp16") else f"it takes bf16 and fp16, not {activations}"


def _bad_head(head_dim: int, longest: int | None, multiple: int) -> str | None:
    if longest is not None and head_dim > longest:
        return f"it takes heads of up to {longest}, not {head_dim}"
    return f"it takes heads of a multiple of {multiple}, not {head_dim}" if head_dim % multiple else None
