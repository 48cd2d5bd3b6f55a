"""The producer of values in Triton's interpreter, what the launch of the attention refuses, and its operator."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from gossamer.errors import InvalidOptionError, UnsupportedShapeError
from gossamer.kernels.attention import attend
from gossamer.kernels.attention_fp8 import KEPT, ByPlace, attend_fp8_values, key_boxes
from gossamer.kernels.attention_values import BLOCK, HEAD, values_in_torch
from gossamer.kernels.attention_values_kernel import values_launch

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


# values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "heads", "tokens"), [(1, 1, 1), (1, 2, 128), (2, 2, 129), (1, 1, 300)])
def test_values_before_their_rounding(batch, heads, tokens):
    """Codes in float32 stand in for e4m3, which the interpreter stores wrong; torch rounds them afterwards."""
    v = views(batch, tokens, heads, width=3 * heads * HEAD + 64, device=DEVICE)[2]
    v[0, 0, 0] *= 1000
    blocks = -(-tokens // BLOCK)
    codes = torch.full((batch * heads * HEAD, blocks * BLOCK), torch.nan, device=DEVICE)
    exponents = torch.full((batch * heads, blocks), torch.nan, device=DEVICE)
    values_launch(v)(v, codes, exponents)
    expected = values_in_torch(v)
    assert torch.equal(exponents, expected.exponents)
    assert torch.equal(codes.to(torch.float8_e4m3fn).float(), expected.codes.float())


# refusals -------------------------------------------------------------------------------------------------------------


def refused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        attend(q, k, v, "fp8_values")
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


def test_strides_that_the_copy_engine_cannot_take():
    q, k, v = views(1, 8, 2, width=6 * HEAD + 4)
    assert "strides (" in refused(q, k, v, InvalidOptionError)
    q, k, v = views(1, 8, 2)
    turned = k.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert "last dimension" in refused(q, turned, v, InvalidOptionError)
    spread = torch.zeros(1, 2, 8, 132, dtype=torch.bfloat16)[..., :HEAD]
    assert "k has strides" in refused(q, spread, v, InvalidOptionError)


def test_strides_that_nothing_steps_by_may_be_any():
    q, k, v = views(1, 1, 1)
    odd = k.as_strided(k.shape, (3, 5, 7, 1))
    assert key_boxes(odd).strides == [HEAD, HEAD, HEAD, 1]
    assert "cpu" in refused(q, odd, v, InvalidOptionError)


def test_a_device_that_is_no_gpu():
    assert "cpu" in refused(*views(1, 8, 2), InvalidOptionError)


# the operator and the descriptors -------------------------------------------------------------------------------------


def test_the_operator_has_a_shape_and_strides_without_a_gpu():
    with FakeTensorMode():
        q, k, v = (torch.empty(2, 4, 333, HEAD, dtype=torch.bfloat16, device="cpu") for _ in range(3))
        y = attend_fp8_values(q, k, v)
        assert (y.shape, y.dtype, y.device) == (q.shape, q.dtype, q.device)
        assert y.transpose(1, 2).is_contiguous()
        with pytest.raises(InvalidOptionError):
            attend_fp8_values(q.float(), k, v)


def test_a_tracer_sees_one_operator():
    traced = make_fx(attend_fp8_values, tracing_mode="fake")(*views(1, 8, 2))
    called = [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]
    assert called == ["gossamer.attend_fp8_values.default", "aten.transpose.int"]


def test_descriptors_are_kept_by_place_and_keep_nothing_alive():
    k, boxes_at = views(2, 8, 2)[1], ByPlace(key_boxes)
    first, copy = boxes_at(k), k.clone()
    assert boxes_at(copy) is not first
    assert boxes_at(k[:]) is first
    assert boxes_at(k[:, :, :4]) is not first
    assert boxes_at(k.view(torch.float16)) is not first
    assert (first.base.data_ptr(), first.strides) == (k.data_ptr(), list(k.stride()))
    alive = weakref.ref(k)
    del k
    assert alive() is None


def test_a_bounded_number_is_kept():
    boxes_at = ByPlace(key_boxes)
    buffer = torch.zeros(1, 1, KEPT + 9, HEAD, dtype=torch.bfloat16)
    for start in range(KEPT + 1):
        boxes_at(buffer[:, :, start:])
    assert len(boxes_at._made) == 1


def test_what_is_refused_is_not_kept():
    q, k, v = views(1, 8, 2)
    for _ in range(2):
        assert "cpu" in refused(q, k, v, InvalidOptionError)
