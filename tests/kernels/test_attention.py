import math

import pytest
import torch

from gossamer.errors import UnknownOptionError
from gossamer.kernels.attention import BACKENDS, attend
from gossamer.kernels.backends import attention_backend
from gossamer.kernels.detect import detect

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ("cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU]))


def qkv(device: str, dtype: torch.dtype, tokens: int = 45, head_dim: int = 32) -> tuple[torch.Tensor, ...]:
    """Views into one (batch, tokens, 3 * heads * head_dim) buffer, as the fused projection leaves them."""
    generator = torch.Generator().manual_seed(4)
    buffer = torch.randn(2, tokens, 3, 4, head_dim, generator=generator).to(device, dtype)
    return tuple(buffer[:, :, index].transpose(1, 2) for index in range(3))


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (tensor.double() for tensor in (q, k, v))
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [32, 128])
def test_the_chosen_backend_runs_and_is_right(device, dtype, head_dim):
    name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    backend = attention_backend(detect(device), name, head_dim, compute=name).name
    q, k, v = qkv(device, dtype, head_dim=head_dim)
    result = attend(q, k, v, backend)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), exact(q, k, v), rtol=0, atol=max(8 * torch.finfo(dtype).eps, 1e-5))


def test_the_slow_backend_agrees_with_the_fast_one():
    q, k, v = qkv("cpu", torch.float32)
    torch.testing.assert_close(attend(q, k, v, "math"), attend(q, k, v, "flash"), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # torch first warns why each backend cannot serve
@pytest.mark.parametrize("backend", ["cudnn", "efficient"])
def test_a_backend_that_the_device_lacks_raises_instead_of_falling_back(backend):
    q, k, v = qkv("cpu", torch.float32)
    with pytest.raises(RuntimeError):
        attend(q, k, v, backend)


def test_the_switches_of_torch_are_as_they_were():
    before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()
    attend(*qkv("cpu", torch.float32), "math")
    assert before == (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled())


def test_an_unknown_backend():
    with pytest.raises(UnknownOptionError, match="xformers") as caught:
        attend(*qkv("cpu", torch.float32), "xformers")
    assert all(name in caught.value.why for name in BACKENDS)


def test_attention_traces_in_one_graph():
    q, k, v = qkv("cpu", torch.float32)
    compiled = torch.compile(lambda *given: attend(*given, "flash"), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v, "flash"))
