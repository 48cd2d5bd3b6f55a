"""Every storage format that packs, as a fixture: what holds for the linear layer holds on all of them."""

from __future__ import annotations

import pytest

BASE = ("fp32", "fp16", "bf16", "fp8", "fp8_e5m2", "int8", "nf4", "fp4", "nf4-dq", "fp4-dq")
GGUF = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")


@pytest.fixture(params=BASE + GGUF)
def storage(request):
    return request.param
