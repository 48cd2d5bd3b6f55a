"""The producer of codes in Triton's interpreter, what the launch of the attention refuses, and its operator."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from gossamer.errors import InvalidOptionError, UnsupportedShapeError
from gossamer.kernels.attention import attend
from gossamer.kernels.attention_codes import HEAD, codes_in_torch
from gossamer.kernels.attention_codes_kernel import codes_launch, empty_codes
from gossamer.kernels.attention_eight_bit import KEPT, ByPlace, attend_eight_bit, boxes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    """As models are run; the kernels are then launched straight, not through their operator."""
    with torch.no_grad():
        yield


def views(batch: int, tokens: int, heads: int, width: int | None = None, device: object = "cpu") -> list[torch.Tensor]:
    """q, k and v of a buffer (batch, tokens, width), as a block has them."""
    generator = torch.Generator().manual_seed(tokens)
    buffer = torch.randn(batch, tokens, width or 3 * heads * HEAD, generator=generator).to(device, torch.bfloat16)
    parts = (buffer[..., i * heads * HEAD : (i + 1) * heads * HEAD] for i in range(3))
    return [part.unflatten(-1, (heads, HEAD)).transpose(1, 2) for part in parts]


# codes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "heads", "tokens"), [(1, 1, 1), (1, 2, 128), (2, 2, 129), (1, 1, 300)])
def test_codes(batch, heads, tokens):
    """Values in float32 stand in for e4m3, which the interpreter stores wrong; torch rounds them afterwards."""
    q, k, v = views(batch, tokens, heads, width=3 * heads * HEAD + 64, device=DEVICE)
    v[0, 0, 0] *= 1000
    q[0, 0, -1] *= 1e-3
    k[-1, -1, 0] = 0
    blank = empty_codes(q)
    codes = blank._replace(v8=torch.full(blank.v8.shape, torch.nan, device=DEVICE))
    for tensor in codes:
        tensor.fill_(torch.nan if tensor.is_floating_point() else 99)
    codes_launch(q, k, v)(q, k, v, *codes)
    expected = codes_in_torch(q, k, v)
    assert torch.equal(codes.exponents, expected.exponents)
    assert torch.equal(codes.v8.to(torch.float8_e4m3fn).float(), expected.v8.float())
    for found, wanted in ((codes.q8, expected.q8), (codes.k8, expected.k8)):
        off = (
            found.int() - wanted.int()
        ).abs()  # the interpreter rounds the product before it rounds to a whole number
        assert off.max() <= 1
        assert off.float().mean() < 3e-3
    torch.testing.assert_close(codes.q_scales, expected.q_scales, rtol=2e-7, atol=0)
    torch.testing.assert_close(codes.k_scales, expected.k_scales, rtol=2e-7, atol=0)


@pytest.mark.parametrize("which", [0, 1])
def test_a_nan_is_in_its_scale(which):
    tensors = views(1, 200, 2, device=DEVICE)
    tensors[which][0, 1, 3, 5] = torch.nan
    codes = empty_codes(tensors[0])._replace(v8=torch.empty(2 * HEAD, 256, device=DEVICE))
    codes_launch(*tensors)(*tensors, *codes)
    scales = (codes.q_scales[0, :, 3], codes.k_scales[:, 0])[which]
    assert scales.isnan().tolist() == [False, True]
    assert codes_in_torch(*tensors).q_scales.isnan().sum() == 1 - which


# refusals -------------------------------------------------------------------------------------------------------------


def refused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        attend(q, k, v, "eight_bit")
    error = caught.value
    assert error.what
    assert error.why
    assert error.next_step
    return f"{error.what} {error.why}"


def test_shapes_and_types_that_are_no_such_attention():
    q, k, v = views(1, 8, 2)
    assert "(1, 2, 7, 128)" in refused(q, k[:, :, 1:], v, UnsupportedShapeError)
    assert "none empty" in refused(q[:, :, :0], k[:, :, :0], v[:, :, :0], UnsupportedShapeError)
    assert "(1, 4, 8, 64)" in refused(*(x.reshape(1, 4, 8, 64) for x in (q, k, v)), UnsupportedShapeError)
    assert "float16" in refused(q, k, v.half(), InvalidOptionError)


def test_channels_that_are_no_neighbours():
    q, k, v = views(1, 8, 2)
    turned = k.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert "last dimension" in refused(q, turned, v, InvalidOptionError)


def test_a_device_that_is_no_gpu():
    assert "cpu" in refused(*views(1, 8, 2), InvalidOptionError)


# the operator and the descriptors -------------------------------------------------------------------------------------


def test_the_operator_has_a_shape_and_strides_without_a_gpu():
    with FakeTensorMode():
        q, k, v = (torch.empty(2, 4, 333, HEAD, dtype=torch.bfloat16, device="cpu") for _ in range(3))
        y = attend_eight_bit(q, k, v)
        assert (y.shape, y.dtype, y.device) == (q.shape, q.dtype, q.device)
        assert y.transpose(1, 2).is_contiguous()
        with pytest.raises(InvalidOptionError):
            attend_eight_bit(q.float(), k, v)


def test_a_tracer_sees_one_operator():
    traced = make_fx(attend_eight_bit, tracing_mode="fake")(*views(1, 8, 2))
    called = [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]
    assert called == ["gossamer.attend_eight_bit.default", "aten.transpose.int"]


def of(x: torch.Tensor) -> object:
    return boxes(x, (1, 1, 64, HEAD))


def test_descriptors_are_kept_by_place_and_keep_nothing_alive():
    k, boxes_at = torch.zeros(2, 2, 8, HEAD, dtype=torch.int8), ByPlace(of)
    first, copy = boxes_at(k), k.clone()
    assert boxes_at(copy) is not first
    assert boxes_at(k[:]) is first
    assert boxes_at(k[:, :, :4]) is not first
    assert boxes_at(k.view(torch.uint8)) is not first
    assert (first.base.data_ptr(), first.strides) == (k.data_ptr(), list(k.stride()))
    alive = weakref.ref(k)
    del k
    assert alive() is None


def test_a_bounded_number_is_kept():
    boxes_at = ByPlace(of)
    buffer = torch.zeros(1, 1, KEPT + 9, HEAD, dtype=torch.int8)
    for start in range(KEPT + 1):
        boxes_at(buffer[:, :, start:])
    assert len(boxes_at._made) == 1


def test_what_is_refused_is_not_kept():
    q, k, v = views(1, 8, 2)
    for _ in range(2):
        assert "cpu" in refused(q, k, v, InvalidOptionError)
