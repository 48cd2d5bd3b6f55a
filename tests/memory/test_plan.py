"""The planner: what must hold for any budget, and what is refused."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gossamer.errors import InvalidOptionError, UnknownOptionError, UnknownStorageError
from gossamer.memory.adapter_cost import AdapterCost
from gossamer.memory.budget import Budget
from gossamer.memory.cards import find_card
from gossamer.memory.diffusers_names import OFFLOADS, find_offload
from gossamer.memory.efficiency import factors, read_measured
from gossamer.memory.footprint import gpu_bytes, host_bytes, setting
from gossamer.memory.model_specs import DEV
from gossamer.memory.offload_carousel import Arrangement
from gossamer.memory.picture import Job
from gossamer.memory.placement import Placement, spread
from gossamer.memory.plan import AS_FAST, plan
from gossamer.memory.request import Planning, PlanRequest
from gossamer.memory.roofline import Machine, streamed_seconds
from gossamer.memory.subject import known_subject

SUBJECT = known_subject(DEV)
GB = 10**9


def request(gpu: float = 12.9, host: float | None = 64, card: str = "RTX 3060", **named) -> PlanRequest:
    budget = Budget(int(gpu * GB), None if host is None else int(host * GB))
    job = named.pop("job", Job())
    return PlanRequest(SUBJECT, find_card(card), budget, job, **named)


cards = st.sampled_from(["GTX 1660", "RTX 3060", "RTX 4060", "RTX 4090", "H200"])
storages = st.sampled_from([None, "nf4", "Q8_0", "bf16"])
budgets = st.floats(2.3, 60)


@settings(max_examples=25, deadline=None)
@given(cards, storages, budgets, st.floats(0, 20), st.sampled_from([24, 64, None]))
def test_a_larger_budget_is_never_slower(card, storage, gpu, more, host):
    try:
        small = plan(request(gpu, host, card, storage=storage))
    except InvalidOptionError:
        assume(False)
    large = plan(request(gpu + more, host, card, storage=storage))
    # what is at most AS_FAST of the fastest counts as equally fast, and may be given up for fidelity
    assert large.chosen.total_seconds <= AS_FAST * small.chosen.total_seconds * (1 + 1e-9)
    for planning in (small, large):
        _require_sound(planning, (planning is small and gpu) or gpu + more, host)


def _require_sound(planning: Planning, gpu: float, host: float | None) -> None:
    budget = Budget(int(gpu * GB), None if host is None else int(host * GB))
    assert planning.plans[0] is planning.chosen
    assert planning.chosen.fits
    for way in planning.plans:
        within = way.peak_gpu_bytes <= budget.gpu_free < budget.gpu - budget.gpu_reserve
        within = within and (budget.host_free is None or way.host_bytes <= budget.host_free)
        assert way.fits == within
        assert way.reasons
        assert 0 <= way.placement.resident_blocks <= way.blocks == 57
        assert way.peak_gpu_bytes == max(sum(parts.values()) for parts in way.gpu_bytes.values())
        assert all(size >= 0 for parts in way.gpu_bytes.values() for size in parts.values())


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 56),
    st.sampled_from(["nf4", "Q8_0", "bf16"]),
    st.sampled_from(["resident", "evicted", "streamed"]),
    st.floats(0.01, 10),
)
def test_more_resident_blocks_are_hardly_ever_slower_and_only_take_more(count, storage, text, computing):
    of = setting(SUBJECT, Job(), (storage, "bf16"), ("bf16", "bf16"), 0)
    machine = Machine(find_card("RTX 3060"), factors(read_measured()), "bf16", "bf16", "flash")
    blocks = of.weights.blocks

    def seconds(resident: int) -> float:
        arrangement = Arrangement(spread(57, resident), 2)
        return streamed_seconds(machine, computing, blocks, arrangement, pinned=True)

    def held(resident: int) -> int:
        return sum(gpu_bytes(of, Placement(resident, text=text))["denoise"].values())

    most = (seconds(count) + max(blocks) / machine.bus) * (1 + 1e-9)
    assert seconds(count + 1) <= most, "by one copy, where blocks fall otherwise"
    if count < 55:  # at the end the slots go, and all of it may take less
        assert held(count + 1) >= held(count)
    assert host_bytes(of, Placement(count + 1, text=text)) <= host_bytes(of, Placement(count, text=text))


@settings(max_examples=15, deadline=None)
@given(cards, st.sampled_from(["nf4", "Q8_0", "bf16"]), st.floats(3, 60), st.floats(0, 20))
def test_with_formats_given_a_larger_budget_is_never_slower_at_all(card, storage, gpu, more):
    """Nothing can be given up for fidelity then."""
    named = {"storage": storage, "text_storage": "nf4"}
    small, large = (plan(request(each, None, card, **named)).chosen for each in (gpu, gpu + more))
    assert large.step_seconds <= small.step_seconds * (1 + 1e-9)
    assert large.total_seconds <= small.total_seconds * (1 + 1e-9)


@given(st.integers(10**9, 10**11))
def test_a_budget_for_tensors_is_enough_for_them_and_hardly_more(gpu):
    budget = Budget(gpu)
    needed = budget.gpu_for(budget.gpu_free)
    assert needed <= gpu <= needed + 3
    assert budget.gpu_free <= Budget(needed).gpu_free + 1


def test_spread_is_even():
    stay = sorted(spread(57, 19))
    assert len(stay) == 19
    assert {after - before for before, after in pairwise(stay)} == {3}
    assert spread(57, 0) == frozenset()
    assert spread(57, 57) == frozenset(range(57))


# what the issue asks for ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["bf16", "nf4"])
@pytest.mark.parametrize(("gpu", "storage"), [(12, "Q8_0"), (12, "fp8"), (24, "bf16")])
def test_fully_resident_where_it_fits(gpu, storage, text):
    chosen = plan(request(gpu, None, "H200", storage=storage, text_storage=text)).chosen
    assert chosen.kind == "resident"
    assert chosen.placement.resident_blocks == 57


def test_four_bits_on_six_gigabytes():
    chosen = plan(request(6, 32, "H200", storage="nf4")).chosen
    assert chosen.peak_gpu_bytes <= 5.6e9
    free = plan(request(100, None, "H200", storage="nf4")).chosen
    assert chosen.step_seconds <= 1.25 * free.step_seconds


def test_two_gigabytes_work():
    chosen = plan(request(2, 24)).chosen
    assert chosen.placement.text == "streamed"
    assert chosen.placement.vae == "tiled"
    assert chosen.peak_gpu_bytes <= 1.5e9


def test_short_host_memory_leaves_weights_in_their_file_or_makes_them_smaller():
    chosen = plan(request(8.6, 4)).chosen
    assert not chosen.placement.pinned
    assert chosen.storage == SUBJECT.stored
    roomy = plan(request(8.6, 64)).chosen
    assert roomy.placement.pinned
    assert roomy.step_seconds <= chosen.step_seconds


def test_adapters_take_memory_and_time():
    style = AdapterCost("style", 300 * 10**6, 64)
    plain, adapted = (plan(request(8.6, storage="nf4", adapters=each)).chosen for each in ((), (style,)))
    assert adapted.step_seconds > plain.step_seconds
    assert adapted.gpu_bytes["denoise"]["adapters"] == 600 * 10**6


def test_fidelity():
    exact = plan(request(8.6, least_fidelity="exact"))
    assert {way.storage for way in exact.plans} == {"bf16"}
    assert "nf4 weights" in {refused.what for refused in exact.refused}
    anything = plan(request(8.6, least_fidelity="any"))
    assert {"Q2_K", "Q3_K", "fp4"} <= {way.storage for way in anything.plans}
    fp8 = plan(request(25, card="RTX 4090", storage="bf16", compute="fp8")).chosen
    assert fp8.fidelity == 37.6
    for level in ("Q9_K", "IQ1_S", "perfect"):
        with pytest.raises(UnknownOptionError, match="no level of fidelity"):
            plan(request(least_fidelity=level))


def test_every_refusal_says_what_works_instead():
    for planning in (plan(request()), plan(request(least_fidelity="exact")), plan(request(2.3))):
        for refused in planning.refused:
            assert refused.what
            assert refused.why.endswith(".")
            assert refused.instead.endswith(".")
        assert any("modulation" in refused.what for refused in planning.refused)


# offload names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "gpu", "resident", "text"),
    [
        ("none", 60, 57, "resident"),
        ("model", 24, 57, "evicted"),
        ("enable_model_cpu_offload", 24, 57, "evicted"),
        ("sequential", 4, 0, "streamed"),
        ("enable_sequential_cpu_offload", 4, 0, "streamed"),
        ("group", 60, 0, None),
        ("leaf_level", 60, 0, None),
    ],
)
def test_offload_names(name, gpu, resident, text):
    planning = plan(request(gpu, 64, offload=name))
    for way in planning.plans:
        assert way.placement.resident_blocks == resident
        assert text is None or way.placement.text == text
    assert any(f"--offload {find_offload(name).name}" in note for note in planning.notes)


def test_gguf_with_sequential_offload_works_and_says_what_others_do():
    planning = plan(request(4, 32, storage="Q4_K", offload="sequential"))
    assert planning.chosen.storage == "Q4_K"
    assert any("KeyError: None" in note for note in planning.notes)


@pytest.mark.parametrize("name", ["balanced", "custom", "device_map"])
def test_device_maps_are_refused_with_what_works(name):
    with pytest.raises(InvalidOptionError) as error:
        find_offload(name)
    assert "'auto'" in error.value.next_step


def test_unknown_offload_names_the_nearest():
    with pytest.raises(UnknownOptionError) as error:
        find_offload("sequental")
    assert "'sequential'" in error.value.next_step
    names = [name for offload in OFFLOADS for name in (offload.name, *offload.aliases)]
    assert len(set(names)) == len(names)


# what cannot work -----------------------------------------------------------------------------------------------------


def smallest(error: InvalidOptionError, flag: str) -> float:
    return float(error.next_step.split(flag)[1].split("GB")[0])


@pytest.mark.parametrize("named", [{}, {"storage": "bf16"}, {"offload": "none"}, {"job": Job(2048, 2048)}])
def test_too_small_a_gpu_names_the_smallest_that_works(named):
    with pytest.raises(InvalidOptionError, match="does not fit") as error:
        plan(request(1, 64, **named))
    named_budget = smallest(error.value, "--vram ")
    assert plan(request(named_budget, 64, **named)).chosen.fits
    with pytest.raises(InvalidOptionError):
        plan(request(named_budget - 0.02, 64, **named))


@pytest.mark.parametrize("named", [{"storage": "nf4"}, {"storage": "Q8_0", "offload": "sequential"}])
def test_too_small_a_host_names_the_smallest_that_works(named):
    with pytest.raises(InvalidOptionError, match="does not fit") as error:
        plan(request(6, 4, **named))
    named_budget = smallest(error.value, "--ram ")
    assert plan(request(6, named_budget, **named)).chosen.fits
    with pytest.raises(InvalidOptionError):
        plan(request(6, named_budget - 0.02, **named))


def test_too_little_disk():
    full = request()
    full = replace(full, budget=replace(full.budget, disk=10 * GB))
    with pytest.raises(InvalidOptionError, match="on disk"):
        plan(full)
    assert plan(replace(full, budget=replace(full.budget, disk=40 * GB))).chosen.disk_bytes == SUBJECT.disk_bytes


def test_formats_that_cannot_be():
    with pytest.raises(InvalidOptionError, match="packs nothing into it"):
        plan(request(storage="IQ1_S"))
    with pytest.raises(UnknownStorageError):
        plan(request(storage="Q4_Z"))
    with pytest.raises(InvalidOptionError, match="fp8"):
        plan(request(card="RTX 3060", storage="nf4", compute="fp8"))
