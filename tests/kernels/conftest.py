"""Kernels run in Triton's interpreter where there is no GPU; `tests/conftest.py` switches it on."""

from __future__ import annotations

import pytest
from triton.runtime import interpreter


@pytest.fixture(autouse=True)
def scalar_loop_bounds(monkeypatch):
    """Triton 3.6's interpreter turns a loop bound, an array of one element, into an int; NumPy 2.4 refuses that."""
    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
