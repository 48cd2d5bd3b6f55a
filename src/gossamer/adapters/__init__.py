"""Adapters: one canonical form for every file spelling; attach to a quantised model, scale, detach without a trace."""

from gossamer.adapters.adapter import Adapter, LowRankTerm
from gossamer.adapters.attach import Attachment, attach, attached, base_spec, detach, set_scale
from gossamer.adapters.read import read_adapter
from gossamer.adapters.write import write_adapter

__all__ = [
    "Adapter",
    "Attachment",
    "LowRankTerm",
    "attach",
    "attached",
    "base_spec",
    "detach",
    "read_adapter",
    "set_scale",
    "write_adapter",
]
