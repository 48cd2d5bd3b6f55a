from __future__ import annotations

import pytest
import torch

from gossamer.errors import AdapterError
from gossamer.layers import LowRank


def test_shapes_and_bytes():
    low_rank = LowRank("a", torch.zeros(4, 10), torch.zeros(6, 4, dtype=torch.bfloat16), bias=torch.zeros(6))
    assert (low_rank.rank, low_rank.in_features, low_rank.out_features) == (4, 10, 6)
    assert low_rank.nbytes == 4 * 10 * 4 + 6 * 4 * 2 + 6 * 4


@pytest.mark.parametrize(
    ("down", "up", "bias"),
    [((4, 10), (6, 3), None), ((10,), (6, 4), None), ((4, 10), (6, 4, 1), None), ((4, 10), (6, 4), (5,))],
)
def test_factors_that_do_not_fit_are_refused(down, up, bias):
    with pytest.raises(AdapterError, match="'a'"):
        LowRank("a", torch.zeros(down), torch.zeros(up), bias=None if bias is None else torch.zeros(bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_term_is_added_in_float32_whatever_the_factors_are(dtype):
    down, up = torch.randn(4, 10).to(dtype), torch.randn(6, 4).to(dtype)
    weight = torch.randn(6, 10)
    expected = weight.double() + 0.3 * up.double() @ down.double()
    LowRank("a", down, up, 0.3).add_to_weight(weight, weight)
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_missing_bias_counts_as_zero():
    low_rank = LowRank("a", torch.zeros(4, 10), torch.zeros(6, 4), 0.5)
    assert torch.equal(low_rank.scaled_bias(), torch.zeros(6))
    low_rank.bias = torch.ones(6)
    assert torch.equal(low_rank.scaled_bias(), torch.full((6,), 0.5))
