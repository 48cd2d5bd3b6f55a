"""Kernels run in Triton's interpreter where there is no GPU; `tests/conftest.py` switches it on.

Triton exists for Linux only among the test extra; elsewhere its tests cannot be collected, and the others run.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest

HAS_TRITON = find_spec("triton") is not None
NEED_TRITON = ["test_*decode*.py", "test_pointwise_*.py", *(f"test_attention_{part}.py" for part in ("triton", "gpu"))]
collect_ignore_glob = [] if HAS_TRITON else [*NEED_TRITON, "test_attention_compile.py"]


@pytest.fixture(autouse=HAS_TRITON)
def scalar_loop_bounds(monkeypatch):
    """Triton 3.6's interpreter turns a loop bound, an array of one element, into an int; NumPy 2.4 refuses that."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
