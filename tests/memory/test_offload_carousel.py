"""The order of copies and uses, on a simulated device that runs its queues in every order that the waits allow."""

from __future__ import annotations

import random
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.layers.stored import Slot
from gossamer.memory.offload_carousel import Arrangement, Carousel
from gossamer.memory.offload_feed import StraightFeed
from gossamer.memory.offload_home import Pinned
from gossamer.memory.offload_layout import lasting, overlap, ring
from gossamer.memory.offload_recording import Recording
from gossamer.memory.offload_schedule import Cyclic, Once
from gossamer.memory.offload_timeline import step_with_copies

SIZES = (512, 512, 512, 256, 256, 256, 256)


@dataclass(eq=False)
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
        self.queues["copy"].append(("do", lambda: target.copy_(source)))
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

        self.queues["compute"].append(("do", read))

    def run(self, choose):
        while any(self.queues.values()):
            ready = [name for name, queue in self.queues.items() if queue and not self._blocked(queue[0])]
            assert ready, "all queues wait for each other"
            kind, what = self.queues[choose(ready)].pop(0)
            if kind == "do":
                what()
            elif kind == "mark":
                what.passed = True

    @contextmanager
    def recording(self):
        """Inside, work goes into queues of its own, which a `repeat` runs."""
        outside, self.queues = self.queues, {"copy": [], "compute": []}
        try:
            yield self.queues
        finally:
            self.queues = outside

    def repeat(self, recorded):
        """Queue recorded work: its copies in a queue of their own, as branches of a graph are, with new marks.

        As CUDA does, it refuses marks from outside, and copies that do not leave the computing and come back to it.
        """
        own = [what for queue in recorded.values() for kind, what in queue if kind == "mark"]
        waited = [what for queue in recorded.values() for kind, what in queue if kind == "wait"]
        assert all(mark in own for mark in waited), "a mark from outside"
        if recorded["copy"]:
            assert recorded["copy"][0][0] == "wait", "copies do not wait for the beginning"
            last = [what for kind, what in recorded["copy"] if kind == "mark"][-1]
            assert ("wait", last) in recorded["compute"], "the computing does not wait for the last copy"
        marks = {id(mark): Mark() for mark in own}
        for name, queue in (("compute", recorded["compute"]), (f"branch {len(self.queues)}", recorded["copy"])):
            again = [(kind, what if kind == "do" else marks[id(what)]) for kind, what in queue]
            self.queues.setdefault(name, []).extend(again)

    def _record(self, name):
        mark = Mark()
        self.queues[name].append(("mark", mark))
        return mark

    def _wait(self, name, mark):
        self.queues[name].append(("wait", mark))

    @staticmethod
    def _blocked(step):
        kind, what = step
        return kind == "wait" and not what.passed


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
    "copies first": lambda ready: next((name for name in ready if name != "compute"), "compute"),
    "computing first": lambda ready: "compute" if "compute" in ready else ready[0],
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
    assert device.copied == list(range(6)), "in the place of two large blocks there is room for three small ones"


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
    assert ring([2, 2, 2, 1, 1, 1], 5) == [(0, 2), (2, 4), (0, 2), (2, 3), (3, 4), (4, 5)]
    assert ring([2, 2, 2, 1, 1, 1], 9) == [(0, 2), (2, 4), (4, 6), (6, 7), (7, 8), (8, 9)]
    assert ring([], 0) == []


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(0, 60))
def test_every_ring_fits_and_lets_the_next_step_begin(sizes, more):
    capacity = max(sizes) + more
    ranges = ring(sizes, capacity)
    assert [stop - start for start, stop in ranges] == sizes
    assert max(stop for _, stop in ranges) <= capacity
    laps = [list(lap) for lap in laps_of(ranges)]
    assert all(lap[0][0] == 0 and all(a[1] == b[0] for a, b in pairwise(lap)) for lap in laps)
    ahead = lasting(dict(enumerate(ranges)))
    assert not any(overlap(ranges[one], ranges[other]) for one in ahead for other in ahead if one != other)
    assert not any(overlap(ranges[one], ranges[-1]) for one in ahead - {len(sizes) - 1})


def laps_of(ranges):
    lap = []
    for each in ranges:
        if each[0] == 0 and lap:
            yield lap
            lap = []
        lap.append(each)
    yield lap


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
@pytest.mark.parametrize("resident", [(), (2,), (0, 6), range(7)])
def test_a_step_takes_as_long_as_its_timeline_says(slots, resident):
    """The simulated device with a clock: a second each for a block of 256 bytes to copy, and for any to compute."""
    arrangement = Arrangement(frozenset(resident), slots)
    device = SimulatedDevice()
    carousel, stations = opened(device, arrangement)
    device.copied.clear()
    _, queues = record(device, carousel, stations)
    assert ending(queues, [SIZES[index] for index in device.copied]) == pytest.approx(
        step_with_copies(SIZES, arrangement, 256.0, 1.0 * len(SIZES))
    )


def ending(recorded, copied):
    """The second at which a recorded step ends: each queue as early as its marks allow."""
    passed, now, copies = {}, dict.fromkeys(recorded, 0.0), iter(copied)
    left = {name: list(queue) for name, queue in recorded.items()}
    while any(left.values()):
        for name, queue in left.items():
            while queue and not (queue[0][0] == "wait" and id(queue[0][1]) not in passed):
                kind, what = queue.pop(0)
                if kind == "wait":
                    now[name] = max(now[name], passed[id(what)])
                elif kind == "mark":
                    passed[id(what)] = now[name]
                else:
                    now[name] += next(copies) / 256 if name == "copy" else 1.0
    return now["compute"]


# recorded steps -------------------------------------------------------------------------------------------------------


def step_of(device, carousel, stations):
    for index in range(len(stations)):
        carousel.arrive(index)
        device.use(index, stations[index].memory)
        carousel.depart(index)


def opened(device, arrangement, sizes=SIZES):
    """A carousel after its first step."""
    stations = {index: FakeStation(index, size) for index, size in enumerate(sizes)}
    carousel = Carousel(stations, arrangement, Cyclic(len(sizes)), device, StraightFeed(device))
    step_of(device, carousel, stations)
    return carousel, stations


def record(device, carousel, stations):
    recording = Recording(carousel)
    with device.recording() as queues, recording.recorded():
        step_of(device, carousel, stations)
    return recording, queues


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("slots", [1, 2, 3, 7])
@pytest.mark.parametrize("resident", [(), (1, 4), (0, 6), (6,), range(7)])
@pytest.mark.parametrize("sizes", [SIZES, (256,) * 6, (512, 256, 512, 256, 256)])
def test_a_recorded_step_follows_itself_and_any_other(policy, slots, resident, sizes):
    resident = frozenset(index for index in resident if index < len(sizes))
    device, plan = SimulatedDevice(), random.Random(slots).choices(["repeat", "call by call"], k=8)
    carousel, stations = opened(device, Arrangement(resident, slots), sizes)
    recording, queues = record(device, carousel, stations)
    for how in ("repeat", "repeat", *plan):
        if how == "repeat":
            assert recording.possible()
            device.repeat(queues)
            recording.repeated()
        else:
            step_of(device, carousel, stations)
    device.run(POLICIES[policy])
    assert not device.wrong


@pytest.mark.parametrize(
    ("slots", "copies"),
    [
        (1, [0, 1, 2, 3, 4, 5]),  # none can be fetched while the last block computes
        (2, [1, 2, 3, 4, 5, 0]),
        (4, [2, 3, 4, 5, 0, 1]),
        (6, []),
    ],
)
def test_a_recorded_step_copies_as_little_and_as_early_as_can_be(slots, copies):
    device = SimulatedDevice()
    carousel, stations = opened(device, Arrangement(frozenset(), slots), (256,) * 6)
    device.copied.clear()
    record(device, carousel, stations)
    assert device.copied == copies


def test_a_step_that_ended_early_makes_a_recorded_one_impossible():
    device = SimulatedDevice()
    carousel, stations = opened(device, Arrangement(frozenset(), 2), (256,) * 6)
    recording, _ = record(device, carousel, stations)
    for index in range(4):
        carousel.arrive(index)
        carousel.depart(index)
    assert not recording.possible()
    step_of(device, carousel, stations)
    assert recording.possible()
    carousel.close()
    assert not recording.possible()


def fail_in_the_middle(carousel):
    for index in range(3):
        carousel.arrive(index)
        carousel.depart(index)
    raise KeyboardInterrupt


def test_a_recording_that_fails_changes_nothing():
    device = SimulatedDevice()
    carousel, stations = opened(device, Arrangement(frozenset(), 2))
    recording = Recording(carousel)
    with pytest.raises(KeyboardInterrupt), device.recording(), recording.recorded():
        fail_in_the_middle(carousel)
    recording, queues = record(device, carousel, stations)
    device.repeat(queues)
    device.run(POLICIES["copies first"])
    assert not device.wrong
