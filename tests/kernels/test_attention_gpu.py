"""Attention in eight bits on a Hopper GPU: against its reference, and inside a model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from gossamer.kernels.attention import attend
from gossamer.kernels.attention_codes import HEAD, codes_in_torch
from gossamer.kernels.attention_codes_kernel import encode
from gossamer.kernels.attention_eight_bit import attend_eight_bit
from gossamer.kernels.attention_reference import attend_in_torch

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
    some = slice(0, 2)
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
        for name in ("q8", "k8", "exponents"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
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
    from gossamer.kernels.attention_eight_bit_kernel import attention_eight_bit_kernel

    attend(*views(1, 256, 2), "eight_bit")
    device = torch.cuda.current_device()
    variants = len(attention_eight_bit_kernel.device_caches[device][0])
    for batch, tokens, heads in ((1, 1, 1), (2, 16, 3), (1, 1031, 24), (1, 4608, 24)):
        attend(*views(batch, tokens, heads), "eight_bit")
    assert len(attention_eight_bit_kernel.device_caches[device][0]) == variants
