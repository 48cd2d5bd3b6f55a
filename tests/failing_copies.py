"""A device whose memory runs out after some copies of terms."""

from __future__ import annotations

import pytest
import torch

from gossamer.layers import moves


def fail_after(monkeypatch: pytest.MonkeyPatch, count: int) -> list[int]:
    """Let so many copies pass; the list has as many entries as are still left."""
    copied, left = moves._copied, list(range(count))

    def failing(run, device):
        if not left:
            raise torch.OutOfMemoryError("no memory left")
        left.pop()
        return copied(run, device)

    monkeypatch.setattr(moves, "_copied", failing)
    return left
