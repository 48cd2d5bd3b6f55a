"""Windows of a run: which steps are inside, by counting with fractions."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.errors import InvalidOptionError
from gossamer.pipeline.schedule import Schedule

HUNDREDTHS = st.integers(0, 100)


@given(HUNDREDTHS, HUNDREDTHS, st.integers(1, 1000))
def test_a_window_holds_its_start_and_not_its_end(one, other, steps):
    if one == other:
        return
    low, high = sorted((one, other))
    window = Schedule(low / 100, high / 100)
    inside = [step for step in range(steps) if Fraction(low, 100) <= Fraction(step, steps) < Fraction(high, 100)]
    assert list(window.active_steps(steps)) == inside
    assert [step for step in range(steps) if window.factor(step, steps)] == inside


@given(st.lists(HUNDREDTHS, min_size=0, max_size=5), st.integers(1, 1000))
def test_windows_that_meet_share_no_step_and_leave_none_out(cuts, steps):
    edges = sorted({0, *cuts, 100})
    windows = [Schedule(low / 100, high / 100) for low, high in pairwise(edges)]
    assert [sum(window.active(step, steps) for window in windows) for step in range(steps)] == [1] * steps


def test_the_whole_run():
    assert Schedule().whole
    assert Schedule(0, 1).whole
    assert not Schedule(0, 0.999).whole
    assert len(Schedule().active_steps(1)) == 1
    assert str(Schedule(0.2, 0.9)) == "0.2-0.9"


@pytest.mark.parametrize(
    ("start", "end"),
    [(0.5, 0.5), (0.9, 0.2), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 1), (0, float("nan")), ("0", "1"), (False, True)],
)
def test_what_is_no_part_of_a_run(start, end):
    with pytest.raises(InvalidOptionError, match="no part of a run") as caught:
        Schedule(start, end)
    assert caught.value.why
    assert caught.value.next_step
