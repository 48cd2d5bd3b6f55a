"""The order of copies and uses, on a simulated device that runs its two queues in every order that the waits allow."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch

from gossamer.layers.stored import Slot
from gossamer.memory.offload_carousel import Arrangement, Carousel
from gossamer.memory.offload_feed import StraightFeed
from gossamer.memory.offload_home import Pinned
from gossamer.memory.offload_layout import ring
from gossamer.memory.offload_schedule import Cyclic, Once

SIZES = (512, 512, 512, 256, 256, 256, 256)


@dataclass
class Mark:
    passed: bool = False


@dataclass
class SimulatedDevice:
    """Two queues, as streams are; nothing happens before `run`."""

    queues: dict = field(default_factory=lambda: {"copy": [], "compute": []})
    copied: list = field(default_factory=list)
    wrong: list = field(default_factory=list)

    def copy(self, source, target, after=()):
        for mark in after:
            self._wait("copy", mark)
        self.copied.append(int(source[0]))
        self.queues["copy"].append(lambda: target.copy_(source))
        return self._record("copy")

    def reached(self):
        return self._record("compute")

    def hold(self, mark):
        self._wait("compute", mark)

    def use(self, index, memory):
        """A kernel that reads a block: it notes what is not the block's own byte."""

        def read():
            if not bool((memory == index).all()):
                self.wrong.append(index)

        self.queues["compute"].append(read)

    def run(self, choose):
        while any(self.queues.values()):
            ready = [name for name, queue in self.queues.items() if queue and not self._blocked(queue[0])]
            assert ready, "both queues wait for each other"
            step = self.queues[choose(ready)].pop(0)
            if isinstance(step, tuple):
                continue
            step()

    def _record(self, name):
        mark = Mark()
        self.queues[name].append(lambda: setattr(mark, "passed", True))
        return mark

    def _wait(self, name, mark):
        self.queues[name].append(("wait", mark))

    @staticmethod
    def _blocked(step):
        return isinstance(step, tuple) and not step[1].passed


class CopiesTooEarly(SimulatedDevice):
    def copy(self, source, target, after=()):
        return super().copy(source, target, ())


class UsesTooEarly(SimulatedDevice):
    def hold(self, mark):
        pass


class FakeStation:
    """Bytes that all are the block's index."""

    def __init__(self, index, size):
        self.nbytes = size
        self.home = Pinned(torch.full((size,), index, dtype=torch.uint8))
        self.slot = Slot(torch.device("cpu"))
        self.memory = None

    def occupy(self, memory):
        self.memory = memory

    def vacate(self):
        self.memory = None


POLICIES = {
    "copies first": lambda ready: "copy" if "copy" in ready else "compute",
    "computing first": lambda ready: "compute" if "compute" in ready else "copy",
    **{f"random {seed}": random.Random(seed).choice for seed in range(4)},
}


def drive(device, steps, arrangement, schedule, sizes=SIZES, choose=POLICIES["copies first"]):
    """Run the blocks of each step through a carousel on the device."""
    stations = {index: FakeStation(index, size) for index, size in enumerate(sizes)}
    carousel = Carousel(stations, arrangement, schedule, device, StraightFeed(device))
    for blocks in steps:
        for index in blocks:
            carousel.arrive(index)
            assert stations[index].slot.filled
            device.use(index, stations[index].memory)
            carousel.depart(index)
    device.run(choose)
    return carousel, stations


def every_block(steps):
    return [range(len(SIZES))] * steps


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("resident", [(), (1, 4), (0, 6), range(7)])
def test_every_use_sees_its_own_bytes(policy, slots, resident):
    device = SimulatedDevice()
    drive(device, every_block(3), Arrangement(frozenset(resident), slots), Cyclic(7), choose=POLICIES[policy])
    assert not device.wrong


@pytest.mark.parametrize("policy", POLICIES)
def test_blocks_that_come_in_another_order_than_expected(policy):
    """What a step cache does that gave no schedule."""
    device, order = SimulatedDevice(), random.Random(5)
    steps = [sorted(order.sample(range(7), order.randint(1, 7))) for _ in range(12)]
    drive(device, steps, Arrangement(frozenset({3}), 2), Cyclic(7), choose=POLICIES[policy])
    assert not device.wrong


@pytest.mark.parametrize("broken", [CopiesTooEarly, UsesTooEarly])
def test_a_missing_wait_is_noticed(broken):
    found = set()
    for choose in POLICIES.values():
        device = broken()
        drive(device, every_block(3), Arrangement(frozenset(), 2), Cyclic(7), choose=choose)
        found |= set(device.wrong)
    assert found


def test_copies_run_ahead_of_the_computing():
    """While a block computes, the copy of the next one waits for nothing that is still to come."""
    device = SimulatedDevice()
    stations = {index: FakeStation(index, 256) for index in range(4)}
    carousel = Carousel(stations, Arrangement(frozenset(), 2), Cyclic(4), device, StraightFeed(device))
    carousel.arrive(0)
    assert device.copied == [0, 1]
    carousel.depart(0)
    assert device.copied == [0, 1, 2]
    for index in (1, 2, 3):
        carousel.arrive(index)
        carousel.depart(index)
    assert device.copied == [0, 1, 2, 3, 0, 1], "the last blocks of a step fetch the first of the next one"


def test_smaller_blocks_are_fetched_further_ahead():
    device = SimulatedDevice()
    drive(device, [range(3)], Arrangement(frozenset(), 2), Cyclic(7))
    assert device.copied == list(range(7)), "in the place of two large blocks there is room for four small ones"


def test_resident_blocks_are_copied_once():
    device = SimulatedDevice()
    drive(device, every_block(5), Arrangement(frozenset(range(7)), 2), Cyclic(7))
    assert sorted(device.copied) == list(range(7))


def test_what_the_schedule_leaves_out_is_not_copied():
    class FirstAndLast:
        def __call__(self, index):
            return (6, 0) if index == 0 else (0, 6)

    device = SimulatedDevice()
    drive(device, [(0, 6)] * 4, Arrangement(frozenset(), 1), FirstAndLast())
    assert set(device.copied) == {0, 6}
    assert not device.wrong


def test_memory_is_given_back_when_nothing_is_expected():
    device = SimulatedDevice()
    _, stations = drive(device, every_block(2), Arrangement(frozenset(), 2), Once(7))
    assert all(station.memory is None for station in stations.values())
    assert device.copied == [*range(7), *range(7)]


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_no_more_than_the_slots_are_on_the_device(slots):
    _, stations = drive(SimulatedDevice(), every_block(1), Arrangement(frozenset({2}), slots), Cyclic(7))
    shared = {station.memory.untyped_storage().data_ptr(): station for i, station in stations.items() if i != 2}
    assert [station.memory.untyped_storage().nbytes() for station in shared.values()] == [slots * 512]
    arrangement = Arrangement(frozenset({2}), slots)
    assert arrangement.device_bytes(dict(enumerate(SIZES))) == slots * 512 + 512


def test_a_buffer_is_not_larger_than_what_it_is_for():
    assert Arrangement(frozenset({0, 1}), 4).buffer_bytes({0: 512, 1: 512, 2: 256}) == 256


def test_ring():
    assert ring([2, 2, 2, 1, 1, 1], 4) == [(0, 2), (2, 4), (0, 2), (2, 3), (3, 4), (0, 1)]
