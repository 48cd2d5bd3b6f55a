"""Stacks of low-rank terms: how much memory there is while they are made, and that it is free when they go."""

from __future__ import annotations

import gc
from itertools import pairwise

import pytest
import torch

from gossamer.kernels.low_rank import delta
from gossamer.layers import LowRank
from gossamer.layers.stacks import Wanted, refresh, stack
from live_bytes import LiveBytes

BLOCKS = 12
LINEARS = {"a": (96, 64), "b": (64, 128), "c": (192, 64), "d": (64, 96), "e": (160, 96), "f": (96, 160)}


@pytest.fixture
def no_cycles_are_searched():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def terms_of(adapters, rank, dtype=torch.float32):
    """By linear and block the terms of all adapters, their factors alone in memory."""
    torch.manual_seed(0)
    return {
        (name, block): tuple(
            LowRank(str(number), torch.randn(rank, width).to(dtype), torch.randn(out, rank).to(dtype), 0.5 + number)
            for number in range(adapters)
        )
        for name, (out, width) in LINEARS.items()
        for block in range(BLOCKS)
    }


def wanted_of(terms):
    """What layers want: each alone, or two of one input as bands of one height, the second as two of them."""
    groups = (("a", "c"), ("b",), ("d",), ("e",), ("f",))
    return [
        Wanted(tuple(terms[name, block] for name in group), (1, 2)[: len(group)])
        for group in groups
        for block in range(BLOCKS)
    ]


def largest(stacks):
    """Bytes of the factors of the largest batch."""
    return max(sum(part.untyped_storage().nbytes() for part in (of.terms.up, of.terms.down)) for of in stacks)


def values(wanted):
    return [[(term.up.clone(), term.down.clone()) for layer in of.layers for term in layer] for of in wanted]


@pytest.mark.parametrize(("adapters", "rank"), [(1, 16), (1, 8), (4, 16), (3, 16)])
def test_one_kind_at_most_is_there_twice(adapters, rank, no_cycles_are_searched):
    with torch.no_grad(), LiveBytes() as live:
        wanted = wanted_of(terms_of(adapters, rank))
        before = live.now
        live.reset()
        made = stack(wanted)
        assert live.peak <= max(before, live.now) + 1.25 * largest(made)


def test_stacks_hold_what_terms_were(no_cycles_are_searched):
    terms = terms_of(3, 16)
    wanted = wanted_of(terms)
    before = values(wanted)
    made = stack(wanted)
    refresh({one.batch for one in made})
    by_wanted = {one.wanted: one for one in made}
    for of, factors in zip(wanted, before, strict=True):
        for term, (up, down) in zip([term for layer in of.layers for term in layer], factors, strict=True):
            assert torch.equal(term.up, up)
            assert torch.equal(term.down, down)
        expected = [sum(term.scale * term.delta(term.up) for term in layer) for layer in of.layers]
        torch.testing.assert_close(delta(by_wanted[of].terms), torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_stacks_that_are_not_needed_any_more_are_free_at_once(no_cycles_are_searched):
    with torch.no_grad(), LiveBytes() as live:
        empty, held = live.now, []
        for _ in range(3):
            wanted = wanted_of(terms_of(1, 16))
            made = stack(wanted)
            refresh({one.batch for one in made})
            held.append(live.now - empty)
        assert all(one == other for one, other in pairwise(held)), "those of before are gone"
        del made, wanted
        assert live.now == empty


def test_terms_of_another_adapter_take_the_place_of_the_stacks_that_are_there(no_cycles_are_searched):
    with torch.no_grad(), LiveBytes() as live:
        terms = terms_of(2, 16)
        first = wanted_of({key: of[:1] for key, of in terms.items()})
        made = stack(first)
        del first, made
        wanted = wanted_of(terms)
        before = live.now
        live.reset()
        made = stack(wanted)
        assert live.peak <= max(before, live.now) + 1.25 * largest(made)
