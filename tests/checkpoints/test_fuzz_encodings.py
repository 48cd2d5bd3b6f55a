"""The fuzzer of encoded weights in short: nothing but sound weights and errors of ours, and all of these occur."""

from __future__ import annotations

import random

import pytest
from fuzz_encodings import EXPECTED, LAYERS, file_of, fuzz, hostile, read_encodings
from fuzz_headers import outcome
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("make", sorted(set(LAYERS), key=lambda make: make.__name__), ids=lambda make: make.__name__)
@pytest.mark.parametrize("in_metadata", [False, True])
def test_a_layer_that_was_not_changed_is_sound(make, in_metadata, tmp_path):
    path = tmp_path / "file.safetensors"
    for seed in range(5):
        path.write_bytes(file_of(make(random.Random(seed)), prefix="a.", in_metadata=in_metadata))
        assert outcome(path, read_encodings) == "sound"


@given(rng=st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_mutation_raises_anything_else(tmp_path, rng):
    path = tmp_path / "file.safetensors"
    path.write_bytes(hostile(rng))
    assert outcome(path, read_encodings) in EXPECTED


def test_the_long_run_in_short(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fuzz(600, 11).keys() == set(EXPECTED)
