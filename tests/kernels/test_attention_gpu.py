"""Attention in eight bits on a Hopper GPU: against its reference, alone and behind norm and rotation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

from gossamer.kernels.attention import attend, heads_first, tokens_first
from gossamer.kernels.attention_codes import HEAD, Codes, codes_in_torch
from gossamer.kernels.attention_codes_kernel import codes_kernel, encode
from gossamer.kernels.attention_eight_bit import attend_eight_bit
from gossamer.kernels.attention_eight_bit_kernel import attention_eight_bit_kernel
from gossamer.kernels.attention_normed import attend_normed, turn_of
from gossamer.kernels.attention_reference import attend_in_torch, attend_normed_in_torch, normed_codes_in_torch
from gossamer.kernels.pointwise import HeadNorm, Rotation, TextNorm, rotary
from gossamer.kernels.pointwise.backends import triton_functions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fresh memory is NaN, so that a value that no kernel wrote shows; no gradients, as models are run."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    with torch.no_grad():
        yield
    torch.use_deterministic_algorithms(before)


def views(batch: int, tokens: int, heads: int, width: int | None = None, sharp: float = 1.0) -> list[torch.Tensor]:
    """q, k and v of a buffer (batch, tokens, width), as a block has them."""
    generator = torch.Generator("cuda").manual_seed(tokens)
    shape = batch, tokens, width or 3 * heads * HEAD
    buffer = torch.randn(*shape, generator=generator, device="cuda").bfloat16()
    parts = (buffer[..., i * heads * HEAD : (i + 1) * heads * HEAD] for i in range(3))
    q, k, v = (part.unflatten(-1, (heads, HEAD)).transpose(1, 2) for part in parts)
    q *= sharp
    return [q, k, v]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def assert_right(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The reference but for bf16's rounding of the result, and for P that fall on the other side of a tie.

    The first is 2^-9 at most, 0.0017 in the mean square. The kernel's logarithms are off by 6e-5 at most, float32's
    rounding beside its bias, so that 1 P in 500 may fall on the other side and move by a step of e4m3, about a tenth.
    """
    y = attend(q, k, v, "eight_bit")
    assert y.shape == q.shape
    assert y.isfinite().all()
    assert relative(y, attend_in_torch(q, k, v)) < 0.01
    return y


def test_the_poison_works():
    assert torch.empty(64, device="cuda").isnan().all()


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127, 128, 129, 333])
def test_lengths(tokens):
    assert_right(*views(2, tokens, 3))


@pytest.mark.parametrize(("tokens", "heads", "width"), [(4608, 24, 9216), (4608, 24, 21504), (4609, 2, None)])
def test_the_sizes_of_flux(tokens, heads, width):
    q, k, v = views(1, tokens, heads, width)
    some = [0, heads - 1]  # the last tiles are narrow
    y = attend(q, k, v, "eight_bit")
    assert y.isfinite().all()
    assert relative(y[:, some], attend_in_torch(q[:, some], k[:, some], v[:, some])) < 0.01
    exact = F.scaled_dot_product_attention(*(x[:, some].float() for x in (q, k, v)))
    assert 0.01 < relative(y[:, some], exact) < 0.05
    assert y.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("sharp", [3.0, 12.0])
def test_large_logits(sharp):
    assert_right(*views(2, 333, 3, sharp=sharp))


def test_logits_of_hundreds():
    """One key a row, or two, and their logits are off by several units: but nothing overflows."""
    q, k, v = views(2, 333, 3, sharp=100.0)
    y = attend(q, k, v, "eight_bit")
    assert y.isfinite().all()
    assert relative(y, attend_in_torch(q, k, v)) < 0.02


@pytest.mark.parametrize("scale", [2.0**-60, 1e-3, 2.0**60])
def test_values_of_any_size(scale):
    q, k, v = views(1, 300, 2)
    v *= scale
    v[:, :, 128:256] *= 1024
    assert_right(q, k, v)


def test_codes_are_those_of_the_reference():
    for width in (None, 9 * HEAD + 64):
        q, k, v = views(2, 333, 3, width)
        q *= torch.linspace(1e-3, 50, 333, device="cuda")[:, None]
        q[0, 0, 7] = 0
        found, expected = encode(q, k, v), codes_in_torch(q, k, v)
        assert torch.equal(found.exponents, expected.exponents)
        for name in ("q8", "k8"):
            off = (getattr(found, name).int() - getattr(expected, name).int()).abs()
            assert off.max() <= 1, name
            assert off.float().mean() < 3e-3, name  # ties
        assert torch.equal(found.v8.view(torch.uint8), expected.v8.view(torch.uint8))
        for name in ("q_scales", "k_scales"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=2e-7, atol=0)


def test_the_same_again():
    q, k, v = views(1, 4608, 24, 21504)
    first = attend(q, k, v, "eight_bit")
    assert all(torch.equal(attend(q, k, v, "eight_bit"), first) for _ in range(5))


def test_heads_and_batches_do_not_mix():
    q, k, v = views(2, 200, 4)
    every = attend(q, k, v, "eight_bit")
    for batch in range(2):
        one = slice(batch, batch + 1)
        assert torch.equal(attend(q[one, 1:3], k[one, 1:3], v[one, 1:3], "eight_bit"), every[one, 1:3])


def test_a_nan_is_not_hidden():
    for which in range(3):
        tensors = views(1, 300, 2)
        tensors[which][0, 1, 17, 5] = torch.nan
        y = attend(*tensors, "eight_bit")
        assert y[0, 0].isfinite().all()
        assert y[0, 1].isnan().any()


def test_memory_that_is_reused_is_described_anew():
    """Another layout at the same address, and other values there."""
    buffer = torch.randn(1, 512, 3 * 4 * HEAD, device="cuda").bfloat16()
    for heads, tokens in ((4, 512), (2, 512), (4, 300)):
        parts = buffer[:, :tokens, : 3 * heads * HEAD].unflatten(-1, (3, heads, HEAD)).permute(2, 0, 3, 1, 4)
        assert_right(*parts)
        buffer.normal_()
        assert_right(*parts)


def test_views_that_begin_anywhere():
    buffer = torch.randn(8 * 3 * HEAD + 3, device="cuda").bfloat16()[3:]
    assert_right(*buffer.view(1, 8, 3, 1, HEAD).permute(2, 0, 3, 1, 4))


# behind norm and rotation ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What a block gives its attention."""

    qkv: torch.Tensor
    rotation: Rotation
    norm: HeadNorm
    text: TextNorm | None

    def attended(self) -> torch.Tensor:
        return attend_normed(self.qkv, self.rotation, self.norm, self.text)

    def expected(self) -> torch.Tensor:
        return attend_normed_in_torch(self.qkv, self.rotation, self.norm, self.text)

    def in_two(self) -> torch.Tensor:
        """Norm and rotation in place on a copy, rounded to bf16, then attention."""
        qkv = triton_functions().qk_norm_rope_(self.qkv.clone(), self.rotation, self.norm, self.text)
        return tokens_first(attend(*heads_first(qkv, HEAD), "eight_bit"))


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


def case(batch: int, tokens: int, heads: int, text_tokens: int | None, width: int | None = None) -> Case:
    whole = normal(batch, tokens, width or 3 * heads * HEAD, seed=tokens).bfloat16()
    angles = normal(tokens, HEAD // 2, seed=1).mul(10)
    weights = 1 + 0.3 * normal(4, HEAD, seed=2)
    image, own = HeadNorm(*weights[:2].bfloat16()), HeadNorm(*weights[2:].bfloat16())
    text = TextNorm(text_tokens, own) if text_tokens is not None else None
    return Case(whole[..., : 3 * heads * HEAD], Rotation(angles.cos(), angles.sin()), image, text)


def assert_same_codes(found: Codes, expected: Codes) -> None:
    """But for the last bits of float32, with which a value now and then falls on the other side of a tie."""
    assert torch.equal(found.exponents, expected.exponents)
    assert torch.equal(found.v8.view(torch.uint8), expected.v8.view(torch.uint8))
    for name in ("q8", "k8"):
        off = (getattr(found, name).int() - getattr(expected, name).int()).abs()
        assert off.max() <= 1, name
        assert off.float().mean() < 1e-3, name
    for name in ("q_scales", "k_scales"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=0)


@pytest.mark.parametrize("text_tokens", [None, 0, 100, 256, 333], ids=str)
@pytest.mark.parametrize("width", [None, 9 * HEAD + 64], ids=["alone", "wider"])
def test_normed_codes_are_those_of_the_reference(text_tokens, width):
    given = case(2, 333, 3, text_tokens, width)
    turn = turn_of(given.rotation, given.norm, given.text)
    found = encode(*heads_first(given.qkv, HEAD), turn)
    assert_same_codes(found, normed_codes_in_torch(given.qkv, given.rotation, given.norm, given.text))


@pytest.mark.parametrize("text_tokens", [None, 50], ids=["single", "double"])
@pytest.mark.parametrize("tokens", [63, 128, 129, 333])
def test_norm_rotation_and_attention_in_one(tokens, text_tokens):
    given = case(2, tokens, 3, text_tokens)
    before = given.qkv.clone()
    y = given.attended()
    assert y.shape == (2, tokens, 3 * HEAD)
    assert y.is_contiguous()
    assert y.isfinite().all()
    assert relative(y, given.expected()) < 0.01
    assert torch.equal(given.qkv, before)


@pytest.mark.parametrize(("text_tokens", "width"), [(512, 9216), (None, 21504)], ids=["double", "single"])
def test_the_sizes_of_flux_in_one(text_tokens, width):
    """Rounding q and k to bf16 first moves few codes, but each such logit has another P on the other side of a tie: the
    two ways are 0.028 apart in torch, each of them 0.038 from what is exact."""
    given = case(1, 4608, 24, text_tokens, width)
    y, in_two = given.attended(), given.in_two()
    assert y.isfinite().all()
    assert relative(y, in_two) < 0.04
    q, k = rotary.qk_norm_rope(given.qkv, given.rotation, given.norm, given.text)
    v, some = heads_first(given.qkv, HEAD)[2], slice(0, 2)
    exact = F.scaled_dot_product_attention(*(x[:, some] for x in (q.transpose(1, 2), k.transpose(1, 2), v.float())))
    ours, theirs = (relative(x[..., : 2 * HEAD], tokens_first(exact)) for x in (y, in_two))
    assert ours < 1.02 * theirs < 0.05


def test_a_nan_is_not_hidden_by_the_norm():
    for which in range(3):
        given = case(1, 300, 2, 100)
        heads_first(given.qkv, HEAD)[which][0, 1, 17, 5] = torch.nan
        y = given.attended().unflatten(-1, (2, HEAD))
        assert y[:, :, 0].isfinite().all()
        assert y[:, :, 1].isnan().any()


def test_the_operator_that_norms_does_what_a_launch_does():
    for text_tokens in (None, 100):
        given = case(2, 333, 3, text_tokens)
        direct = given.attended()
        with torch.enable_grad():
            through = given.attended()
        assert torch.equal(through, direct)
        assert through.stride() == direct.stride()


def test_the_operator_that_norms_keeps_what_it_promises():
    for text_tokens in (None, 100):
        given = case(1, 200, 2, text_tokens)
        turn = turn_of(given.rotation, given.norm, given.text)
        torch.library.opcheck(torch.ops.gossamer.attend_normed.default, (given.qkv, *turn))


def test_norm_rotation_and_attention_compile_as_one_graph():
    given = case(1, 333, 2, 100)

    def doubled(qkv: torch.Tensor) -> torch.Tensor:
        return attend_normed(qkv, given.rotation, given.norm, given.text) * 2

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(given.qkv), given.attended() * 2)


def test_a_graph_replays_norm_rotation_and_attention():
    given = case(1, 640, 4, 100)
    given.attended()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = given.attended()
    for _ in range(2):
        given.qkv.normal_()
        given.norm.query.normal_()
        graph.replay()
        assert torch.equal(y, given.attended())


# ways of calling ------------------------------------------------------------------------------------------------------


def test_the_operator_does_what_a_launch_does():
    q, k, v = views(2, 333, 3)
    direct = attend_eight_bit(q, k, v)
    with torch.enable_grad():
        through = attend_eight_bit(q, k, v)
    assert torch.equal(through, direct)
    assert through.stride() == direct.stride()


def test_the_operator_keeps_what_it_promises():
    torch.library.opcheck(torch.ops.gossamer.attend_eight_bit.default, tuple(views(1, 200, 2)))


def test_it_compiles_as_one_graph():
    q, k, v = views(1, 333, 2)
    compiled = torch.compile(lambda *given: attend(*given, "eight_bit") * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), attend(q, k, v, "eight_bit") * 2)


def test_a_graph_replays_it():
    q, k, v = views(1, 640, 4)
    attend(q, k, v, "eight_bit")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = attend(q, k, v, "eight_bit")
    for _ in range(2):
        for x in (q, k, v):
            x.normal_()
        graph.replay()
        assert torch.equal(y, attend(q, k, v, "eight_bit"))


def test_two_streams_at_once():
    kinds = [views(1, 1024, 8), views(1, 1024, 8, width=21504)]
    expected = [attend(*each, "eight_bit") for each in kinds]
    streams = [torch.cuda.Stream() for _ in kinds]
    torch.cuda.synchronize()
    found = []
    for _ in range(20):
        for stream, each in zip(streams, kinds, strict=True):
            with torch.cuda.stream(stream):
                found.append(attend(*each, "eight_bit"))
    torch.cuda.synchronize()
    assert all(torch.equal(one, expected[place % 2]) for place, one in enumerate(found))


def test_a_new_length_compiles_nothing():
    device, kernels = torch.cuda.current_device(), (attention_eight_bit_kernel, codes_kernel)

    def variants() -> list[int]:
        return [len(kernel.device_caches[device][0]) for kernel in kernels]

    def both(batch: int, tokens: int, heads: int) -> None:
        attend(*views(batch, tokens, heads), "eight_bit")
        case(batch, tokens, heads, min(tokens, 100)).attended()

    both(1, 256, 2)
    before = variants()
    for batch, tokens, heads in ((1, 17, 2), (2, 16, 3), (1, 1031, 24), (1, 4608, 24)):
        both(batch, tokens, heads)
    assert variants() == before
