"""What adapters take of a device while they come, are stacked and go: bytes counted, a clone for each copy to it."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from gossamer.adapters import attach, attached, detach
from gossamer.adapters.host_memory import side_by_side
from gossamer.bench.random_flux import FLUX_DEV, Workload, adapter_bytes, fill, random_adapters
from gossamer.kernels.operators import lasting
from gossamer.layers import moves
from gossamer.models.flux import FluxTransformer, prepare
from gossamer.models.swap import linear_layers, quantize
from live_bytes import LiveBytes

BLOCKS, NARROWER = 8, 24
CONFIG = {
    **FLUX_DEV,
    "num_layers": BLOCKS,
    "num_single_layers": 2 * BLOCKS,
    "num_attention_heads": 24 // NARROWER,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
}


@pytest.fixture(scope="module")
def work():
    return Workload("FLUX.1, narrower", CONFIG, 0.05, 64, 8, torch.device("cpu"))


@pytest.fixture
def model(work):
    with torch.device("meta"):
        model = FluxTransformer.from_config(work.config)
    fill(model, work)
    quantize(model, "nf4")
    prepare(model, "bf16")
    return model.eval()


@pytest.fixture
def live():
    """Counts memory, and no cycles are searched meanwhile."""
    gc.collect()
    gc.disable()
    with torch.no_grad(), LiveBytes() as live:
        yield live
    gc.enable()


@pytest.fixture
def arrive(live, monkeypatch):
    """Attaches an adapter whose tensors are on the host: what a GPU would get are clones, in runs that hold as many of
    a linear's blocks as they do for FLUX.1."""

    def attach_copies(model, adapter, name):
        attach(model, adapter, name)
        terms = [term for layer in linear_layers(model).values() for term in layer.adapters() if term.name == name]
        factors = [factor for term in terms for factor in (term.down, term.up)]
        live.ignore(*factors)
        with monkeypatch.context() as patch:
            patch.setattr(moves, "RUN_BYTES", moves.RUN_BYTES * BLOCKS // FLUX_DEV["num_layers"] // NARROWER)
            patch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: tensor.clone())
            copies = iter(moves.moved(factors, torch.device("meta")))
        for term in terms:
            term.down, term.up = next(copies), next(copies)

    return attach_copies


def renew(model):
    """What the first step does before its first product."""
    executions = [layer.execution for layer in linear_layers(model).values()]
    with lasting():
        for terms in {id(of.workspace.terms): of.workspace.terms for of in executions}.values():
            terms.renew()


def on_host(work, kind, ready=True):
    """Adapters that were read: their tensors alone, or as they are kept for a GPU."""
    with _disable_current_modes():
        adapters = random_adapters(work, kind)
        return [side_by_side(adapter, host_memory) for adapter in adapters] if ready else adapters


def host_memory(count):
    return torch.empty(count, dtype=torch.uint8)


def largest_group(work, ranks):
    """Bytes of the stacks of the widest kind: queries, keys, values and feed-forward part of all single blocks."""
    width = work.config["attention_head_dim"] * work.config["num_attention_heads"]
    rows, bands = 7 * width, 7
    return work.config["num_single_layers"] * ranks * (rows + bands * width) * torch.bfloat16.itemsize


@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize(("kind", "ranks"), [("r64", 64), ("4xr16", 64)])
def test_one_kind_at_most_is_there_twice_while_adapters_are_stacked(model, work, live, arrive, kind, ranks, ready):
    adapters = on_host(work, kind, ready)
    for place, adapter in enumerate(adapters):
        arrive(model, adapter, f"adapter_{place}")
    before, factors = live.now, adapter_bytes(adapters)
    assert before == pytest.approx(factors, rel=0.01)
    live.reset()
    renew(model)
    assert live.peak - before <= 1.2 * largest_group(work, ranks)
    assert live.now < 1.25 * factors


def test_an_adapter_that_comes_later_takes_no_second_set_of_stacks(model, work, live, arrive):
    first, *others = on_host(work, "4xr16")
    for place, adapter in enumerate(others):
        arrive(model, adapter, f"adapter_{place}")
    renew(model)
    arrive(model, first, "last")
    before = live.now
    live.reset()
    renew(model)
    assert live.peak - before <= 1.2 * largest_group(work, 64)


def test_adapters_that_went_are_free_at_once(model, work, live, arrive):
    """Not only when Python next looks for cycles, which may be after many steps."""
    held = []
    for kind in ("r64", "4xr16", "r64"):
        for name in attached(model):
            detach(model, name)
        for place, adapter in enumerate(on_host(work, kind)):
            arrive(model, adapter, f"adapter_{place}")
        renew(model)
        held.append(live.now)
    assert held[0] == held[2]
    assert held[1] < 1.1 * held[0]
