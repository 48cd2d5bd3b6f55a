"""The search for decode geometries reaches those that were chosen by it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gossamer.kernels.decode_geometry import FEW_RANKS, gluon_terms, warpgroup_terms
from gossamer.kernels.decode_support import READABLE

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STORAGES = [name for name, known in READABLE.items() if known.family != "plain"]


@pytest.mark.parametrize("rank", [16, 32, 64])
@pytest.mark.parametrize("storage", STORAGES)
def test_geometries_to_fp8_with_terms_are_among_those_that_are_tried(storage, rank, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tune_decode_variants

    few = rank <= FEW_RANKS
    chosen = gluon_terms(storage, torch.float8_e4m3fn, rank) if few else warpgroup_terms(storage)
    assert chosen in tune_decode_variants.term_variants(storage, rank, "fp8")
