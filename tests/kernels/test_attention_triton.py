"""The producer of codes in Triton's interpreter, what the launch of the attention refuses, and its operators."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from gossamer.errors import InvalidOptionError, UnsupportedShapeError
from gossamer.kernels.attention import attend, heads_first
from gossamer.kernels.attention_codes import HEAD, Codes, codes_in_torch
from gossamer.kernels.attention_codes_kernel import AS_THEY_ARE, Turn, bound_codes, empty_codes
from gossamer.kernels.attention_eight_bit import KEPT, ByPlace, attend_eight_bit, boxes, cut
from gossamer.kernels.attention_normed import attend_normed, turn_of
from gossamer.kernels.attention_reference import normed_codes_in_torch
from gossamer.kernels.pointwise import HeadNorm, Rotation, TextNorm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    """As models are run; the kernels are then launched straight, not through their operator."""
    with torch.no_grad():
        yield


def normal(*shape: int, seed: int = 0, device: object = DEVICE) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def buffer(batch: int, tokens: int, heads: int, width: int | None = None, device: object = "cpu") -> torch.Tensor:
    """Queries, keys and values of a block: the first columns of (batch, tokens, width)."""
    whole = normal(batch, tokens, width or 3 * heads * HEAD, seed=tokens, device=device).bfloat16()
    return whole[..., : 3 * heads * HEAD]


def views(batch: int, tokens: int, heads: int, width: int | None = None, device: object = "cpu") -> list[torch.Tensor]:
    """q, k and v of a buffer, as a block has them."""
    return list(heads_first(buffer(batch, tokens, heads, width, device), HEAD))


def rotation_of(tokens: int, device: object = DEVICE) -> Rotation:
    """Columns of wider tensors."""
    angles = normal(tokens, HEAD, seed=1, device=device).mul(10)
    return Rotation(angles.cos()[:, : HEAD // 2], angles.sin()[:, HEAD // 2 :])


def norm_of(seed: int, dtype: torch.dtype = torch.bfloat16, device: object = DEVICE) -> HeadNorm:
    return HeadNorm(*(normal(HEAD, seed=seed + i, device=device).to(dtype) for i in range(2)))


# codes ----------------------------------------------------------------------------------------------------------------


def encoded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turn: Turn = AS_THEY_ARE) -> Codes:
    """Values in float32 stand in for e4m3, which the interpreter stores wrong; torch rounds them afterwards."""
    blank = empty_codes(q)
    codes = blank._replace(v8=torch.full(blank.v8.shape, torch.nan, device=q.device))
    for tensor in codes:
        tensor.fill_(torch.nan if tensor.is_floating_point() else 99)
    bound_codes(q, k, v, turn)(q, k, v, *turn.tensors, *codes)
    return codes._replace(v8=codes.v8.to(torch.float8_e4m3fn))


def assert_codes(found: Codes, expected: Codes, rtol: float) -> None:
    assert torch.equal(found.exponents, expected.exponents)
    assert torch.equal(found.v8.float(), expected.v8.float())
    for ours, theirs in ((found.q8, expected.q8), (found.k8, expected.k8)):
        # the interpreter rounds the product before it rounds to a whole number
        off = (ours.int() - theirs.int()).abs()
        assert off.max() <= 1
        assert off.float().mean() < 3e-3
    torch.testing.assert_close(found.q_scales, expected.q_scales, rtol=rtol, atol=0)
    torch.testing.assert_close(found.k_scales, expected.k_scales, rtol=rtol, atol=0)


@pytest.mark.parametrize(("batch", "heads", "tokens"), [(1, 1, 1), (1, 2, 128), (2, 2, 129), (1, 1, 300)])
def test_codes(batch, heads, tokens):
    q, k, v = views(batch, tokens, heads, width=3 * heads * HEAD + 64, device=DEVICE)
    v[0, 0, 0] *= 1000
    q[0, 0, -1] *= 1e-3
    k[-1, -1, 0] = 0
    assert_codes(encoded(q, k, v), codes_in_torch(q, k, v), 2e-7)


@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "text_tokens"),
    [
        (1, 1, 1, None),
        (1, 2, 128, None),
        (2, 2, 129, 7),
        (1, 1, 300, 128),
        (1, 2, 131, 0),
        (2, 1, 77, 77),
        (1, 1, 257, 200),
    ],
)
def test_codes_of_normed_and_rotated_queries_and_keys(batch, heads, tokens, text_tokens):
    """A block of 128 may hold text and image."""
    qkv, rotation = buffer(batch, tokens, heads, 3 * heads * HEAD + 64, DEVICE), rotation_of(tokens)
    qkv[0, 0, :HEAD] *= 1000
    qkv[-1, -1, : 2 * heads * HEAD] = 0
    before, norm = qkv.clone(), norm_of(2)
    text = TextNorm(text_tokens, norm_of(4)) if text_tokens is not None else None
    found = encoded(*heads_first(qkv, HEAD), turn_of(rotation, norm, text))
    assert_codes(found, normed_codes_in_torch(qkv, rotation, norm, text), 3e-6)
    assert torch.equal(qkv, before)


def test_weights_of_any_type_and_another_eps():
    qkv, rotation, norm = buffer(1, 40, 2, device=DEVICE) * 1e-3, rotation_of(40), norm_of(2, torch.float32)
    found = encoded(*heads_first(qkv, HEAD), turn_of(rotation, norm, None, 1e-5))
    assert_codes(found, normed_codes_in_torch(qkv, rotation, norm, None, 1e-5), 3e-6)
    assert not torch.allclose(found.q_scales, normed_codes_in_torch(qkv, rotation, norm).q_scales, rtol=0.1)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("normed", [False, True])
def test_a_nan_is_in_its_scale(which, normed):
    tensors = views(1, 200, 2, device=DEVICE)
    tensors[which][0, 1, 3, 5] = torch.nan
    codes = encoded(*tensors, turn_of(rotation_of(200), norm_of(2), None) if normed else AS_THEY_ARE)
    scales = (codes.q_scales[0, :, 3], codes.k_scales[:, 0])[which]
    assert scales.isnan().tolist() == [False, True]
    assert sum(x.isnan().sum() for x in (codes.q_scales, codes.k_scales)) == 1
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


def refused_normed(qkv: torch.Tensor, rotation: Rotation, norm: HeadNorm, kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        attend_normed(qkv, rotation, norm, None)
    return f"{caught.value.what} {caught.value.why}"


@pytest.mark.parametrize("gradients", [False, True], ids=["launch", "operator"])
def test_what_cannot_be_normed_and_attended(gradients):
    qkv, rotation, norm = buffer(1, 8, 2), rotation_of(8, "cpu"), norm_of(2, device="cpu")
    with torch.set_grad_enabled(gradients):
        assert "cos of shape (7, 64)" in refused_normed(qkv, rotation_of(7, "cpu"), norm, UnsupportedShapeError)
        narrow = Rotation(rotation.cos[:, :32], rotation.sin[:, :32])
        assert "cos has shape (8, 32)" in refused_normed(qkv, narrow, norm, UnsupportedShapeError)
        twice = Rotation(rotation.cos.repeat_interleave(2, 1), rotation.sin.repeat_interleave(2, 1))
        assert "cos has shape (8, 128)" in refused_normed(qkv, twice, norm, UnsupportedShapeError)
        short = HeadNorm(norm.query, norm.key[:64])
        assert "key has shape (64,)" in refused_normed(qkv, rotation, short, UnsupportedShapeError)
        spread = Rotation(rotation.cos.t().contiguous().t(), rotation.sin)
        assert "cos has stride" in refused_normed(qkv, spread, norm, InvalidOptionError)
        assert "float32" in refused_normed(qkv.float(), rotation, norm, InvalidOptionError)
        assert "cpu" in refused_normed(qkv, rotation, norm, InvalidOptionError)


# the operators and the descriptors ------------------------------------------------------------------------------------


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


def test_the_operator_that_norms_has_a_shape_without_a_gpu():
    with FakeTensorMode():
        qkv = torch.empty(2, 333, 12 * HEAD, dtype=torch.bfloat16)
        rotation, weight = Rotation(torch.empty(333, HEAD // 2), torch.empty(333, HEAD // 2)), torch.empty(HEAD)
        norm = HeadNorm(weight, weight)
        y = attend_normed(qkv, rotation, norm, TextNorm(5, norm))
        assert (y.shape, y.dtype, y.device) == ((2, 333, 4 * HEAD), qkv.dtype, qkv.device)
        assert y.is_contiguous()


def test_a_tracer_sees_one_operator_that_norms():
    def attended(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return attend_normed(qkv, Rotation(cos, sin), HeadNorm(weight, weight))

    rotation = rotation_of(8, "cpu")
    given = buffer(1, 8, 2), rotation.cos, rotation.sin, norm_of(2, device="cpu").key
    traced = make_fx(attended, tracing_mode="fake")(*given)
    called = [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]
    assert [name for name in called if name.startswith("gossamer")] == ["gossamer.attend_normed.default"]


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


# tiles ----------------------------------------------------------------------------------------------------------------


def rows_of(tile: int, tiles: int, wide: int) -> tuple[int, range]:
    """Head and rows of 64 queries of a tile, as the kernel's `place` has them."""
    index, each, groups = (tile, tiles, 3) if tile < wide else (tile + wide // 2, tiles + tiles // 2, 2)
    return index // each, range(index % each * groups, (index % each + 1) * groups)


@pytest.mark.parametrize("tiles", [1, 2, 5, 24, 25])
@pytest.mark.parametrize("heads", [1, 3, 24, 48])
@pytest.mark.parametrize("programs", [1, 7, 78, 132])
def test_every_row_is_in_one_tile(tiles, heads, programs):
    wide, total = cut(tiles, heads, programs)
    assert wide == total or (wide % programs == 0 and total - wide <= programs)
    found = [(head, row) for head, rows in (rows_of(tile, tiles, wide) for tile in range(total)) for row in rows]
    assert sorted(found) == [(head, row) for head in range(heads) for row in range(3 * tiles)]


def test_flux_at_its_own_size_has_narrow_tiles():
    assert cut(24, 24, 132) == (528, 528 + 72)
